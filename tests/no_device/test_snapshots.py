"""What each rewrite and each region pattern makes of a small graph, in full, and beside it the graph that must stay.

`EXPECTTEST_ACCEPT=1 pytest tests/no_device/test_snapshots.py` writes new texts into this file; read the difference.
"""
# ruff: noqa: E501  (a graph's line is shown as it is)

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from expecttest import TestCase
from torch import Tensor, fx

import pq_fx  # noqa: F401  (registers the ops)
from pq_fx.passes import find_regions
from pq_fx.passes._torch import make_fx
from pq_fx.passes.fuse_act import fuse_act
from pq_fx.passes.fuse_norm import fuse_norm
from pq_fx.passes.join_norms import join_norms
from pq_fx.passes.merge_linears import merge_linears
from pq_fx.passes.rotate_pairs import rotate_pairs
from pq_fx.passes.share_quantize import share_quantize

pq = torch.ops.pq
KEY = "int4:16:bf16"


def trace(function: Callable[..., Any], *shapes: tuple[int, ...]) -> fx.GraphModule:
    args = [torch.zeros(s, dtype=torch.bfloat16) for s in shapes]
    return make_fx(function, pre_dispatch=True, tracing_mode="fake")(*args)


def text(gm: fx.GraphModule) -> str:
    """One line an operation: `add = aten.add.Tensor(x, y)`."""
    gm.graph.eliminate_dead_code()
    lines = []
    for node in gm.graph.nodes:
        if node.op == "output":
            lines.append(f"return {node.args[0]}")
        elif node.op == "call_function":
            named = [f"{k}={v}" for k, v in node.kwargs.items()]
            target = (
                getattr(node.target, "__name__", "")
                if node.target.__module__ == "_operator"
                else node.target
            )
            lines.append(f"{node} = {target}({', '.join([*map(str, node.args), *named])})")
    return "\n".join(lines)


def quantized(x: Tensor, carrier: str = "e4m3") -> Any:
    return pq.quantize(x, None, None, None, KEY, 0, carrier)


class Rewrites(TestCase):
    def once(self, rewrite: Callable, function: Callable, *shapes: tuple[int, ...]) -> str:
        gm = trace(function, *shapes)
        self.assertEqual(rewrite(gm.graph), 1)
        return text(gm)

    def never(self, rewrite: Callable, function: Callable, *shapes: tuple[int, ...]) -> None:
        gm = trace(function, *shapes)
        before = text(gm)
        self.assertEqual(rewrite(gm.graph), 0)
        self.assertEqual(text(gm), before)

    def test_share_quantize(self) -> None:
        def function(x: Tensor) -> Any:
            return *quantized(x), *quantized(x)

        def another_format(x: Tensor) -> Any:
            return *quantized(x), *quantized(x, "codes")

        self.assertExpectedInline(
            self.once(share_quantize, function, (2, 3, 32)),
            """\
quantize = pq.quantize.default(x_1, None, None, None, int4:16:bf16, 0, e4m3)
getitem = getitem(quantize, 0)
getitem_1 = getitem(quantize, 1)
return (getitem, getitem_1, getitem, getitem_1)""",
        )
        self.never(share_quantize, another_format, (2, 3, 32))

    def test_fuse_norm(self) -> None:
        def function(x: Tensor, scale: Tensor, shift: Tensor) -> Any:
            return quantized(F.layer_norm(x, (32,)) * (1 + scale) + shift)

        def read_elsewhere(x: Tensor, scale: Tensor, shift: Tensor) -> Any:
            h = F.layer_norm(x, (32,)) * (1 + scale) + shift
            return *quantized(h), h

        def modulated_by_token(x: Tensor, scale: Tensor, shift: Tensor) -> Any:
            return quantized(F.layer_norm(x, (32,)) * (1 + scale.expand(2, 3, 32)) + shift)

        shapes = ((2, 3, 32), (2, 1, 32), (2, 1, 32))
        self.assertExpectedInline(
            self.once(fuse_norm, function, *shapes),
            """\
norm_quantize_default = pq.norm_quantize.default(x_1, layer, None, None, 1e-05, scale_1, shift_1, None, None, None, int4:16:bf16, 0, e4m3)
getitem = getitem(norm_quantize_default, 0)
getitem_1 = getitem(norm_quantize_default, 1)
return (getitem, getitem_1)""",
        )
        self.never(fuse_norm, read_elsewhere, *shapes)
        self.never(fuse_norm, modulated_by_token, *shapes)

    def test_fuse_act(self) -> None:
        def function(x: Tensor, gate: Tensor) -> Any:
            return quantized(F.silu(x) * gate)

        def another_activation(x: Tensor, gate: Tensor) -> Any:
            return quantized(F.tanh(x) * gate)

        def one_gate_a_token(x: Tensor, gate: Tensor) -> Any:
            return quantized(F.silu(x) * gate[..., :1])

        shapes = ((2, 3, 32), (2, 3, 32))
        self.assertExpectedInline(
            self.once(fuse_act, function, *shapes),
            """\
act_quantize_default = pq.act_quantize.default(x_1, gate_1, silu, None, None, None, None, int4:16:bf16, 0, e4m3)
getitem = getitem(act_quantize_default, 0)
getitem_1 = getitem(act_quantize_default, 1)
return (getitem, getitem_1)""",
        )
        self.never(fuse_act, another_activation, *shapes)
        self.never(fuse_act, one_gate_a_token, *shapes)

    def test_merge_linears(self) -> None:
        def linear(data: Tensor, scale: Tensor, w: Tensor, s: Tensor) -> Tensor:
            return pq.linear(data, scale, None, KEY, w, s, None, KEY, None, torch.bfloat16)

        def traced(carrier: str) -> fx.GraphModule:
            def function(x: Tensor, w: Tensor, s: Tensor, w2: Tensor, s2: Tensor) -> Any:
                data, scale = quantized(x, carrier)
                return linear(data, scale, w, s), linear(data, scale, w2, s2)

            def packed() -> tuple[Tensor, Tensor]:
                scales = torch.zeros(8, 2, dtype=torch.bfloat16)
                return torch.zeros(8, 16, dtype=torch.uint8), scales

            args = (torch.zeros(2, 3, 32, dtype=torch.bfloat16), *packed(), *packed())
            return make_fx(function, pre_dispatch=True, tracing_mode="fake")(*args)

        gm = traced("e4m3")
        self.assertEqual(merge_linears(gm.graph), 2)
        self.assertExpectedInline(
            text(gm),
            """\
quantize = pq.quantize.default(x_1, None, None, None, int4:16:bf16, 0, e4m3)
getitem = getitem(quantize, 0)
getitem_1 = getitem(quantize, 1)
linears_default = pq.linears.default(getitem, getitem_1, None, int4:16:bf16, [w_1, w2_1], [s_1, s2_1], [None, None], int4:16:bf16, [None, None], torch.bfloat16)
split_with_sizes_default = aten.split_with_sizes.default(linears_default, [8, 8], -1)
getitem_2 = getitem(split_with_sizes_default, 0)
getitem_3 = getitem(split_with_sizes_default, 1)
return (getitem_2, getitem_3)""",
        )
        gm = traced("codes")  # decoded inside the GEMM: nothing would be gained
        before = text(gm)
        self.assertEqual(merge_linears(gm.graph), 0)
        self.assertEqual(text(gm), before)

    def test_join_norms(self) -> None:
        def function(x: Tensor, y: Tensor, w: Tensor, v: Tensor) -> Tensor:
            return torch.cat([F.rms_norm(x, (8,), w, 1e-6), F.rms_norm(y, (8,), v, 1e-6)], 1)

        def along_channels(x: Tensor, y: Tensor, w: Tensor, v: Tensor) -> Tensor:
            return torch.cat([F.rms_norm(x, (8,), w, 1e-6), F.rms_norm(x, (8,), v, 1e-6)], -1)

        shapes = ((2, 3, 8), (2, 5, 8), (8,), (8,))
        self.assertExpectedInline(
            self.once(join_norms, function, *shapes),
            """\
view_default = aten.view.default(w_1, [1, 1, -1])
expand_default = aten.expand.default(view_default, [1, 3, -1])
view_default_1 = aten.view.default(v_1, [1, 1, -1])
expand_default_1 = aten.expand.default(view_default_1, [1, 5, -1])
cat_default = aten.cat.default([expand_default, expand_default_1], 1)
cat_default_1 = aten.cat.default([x_1, y_1], 1)
to_dtype = aten.to.dtype(cat_default_1, torch.float32)
mul_tensor = aten.mul.Tensor(to_dtype, to_dtype)
mean_dim = aten.mean.dim(mul_tensor, [-1], True)
add_tensor = aten.add.Tensor(mean_dim, 1e-06)
rsqrt_default = aten.rsqrt.default(add_tensor)
mul_tensor_1 = aten.mul.Tensor(to_dtype, rsqrt_default)
mul_tensor_2 = aten.mul.Tensor(mul_tensor_1, cat_default)
to_dtype_1 = aten.to.dtype(mul_tensor_2, torch.bfloat16)
return to_dtype_1""",
        )
        self.never(join_norms, along_channels, *shapes)

    def test_rotate_pairs(self) -> None:
        def function(x: Tensor) -> Tensor:
            a, b = x.view(2, 3, 4, 2).unbind(-1)
            return torch.stack([-b, a], -1)

        def other_sign(x: Tensor) -> Tensor:
            a, b = x.view(2, 3, 4, 2).unbind(-1)
            return torch.stack([b, -a], -1)

        self.assertExpectedInline(
            self.once(rotate_pairs, function, (2, 3, 8)),
            """\
view = aten.view.default(x_1, [2, 3, 4, 2])
arange_default = aten.arange.default(2, dtype=torch.bfloat16, device=cpu, pin_memory=False)
mul_tensor = aten.mul.Tensor(arange_default, 2)
sub_tensor = aten.sub.Tensor(mul_tensor, 1)
flip_default = aten.flip.default(view, [-1])
mul_tensor_1 = aten.mul.Tensor(flip_default, sub_tensor)
return mul_tensor_1""",
        )
        self.never(rotate_pairs, other_sign, (2, 3, 8))


class Regions(TestCase):
    def regions(self, function: Callable[..., Any], *weights: tuple[int, ...]) -> str:
        """One line a region: its points, who absorbs an order, and the axes that follow one."""
        gm = trace(function, (2, 5, 16), *weights)
        names = [n.name for n in gm.graph.find_nodes(op="placeholder")]
        found = find_regions(gm, dict(zip(names[1:], map(torch.Size, weights), strict=True)))
        lines = []
        for r in found.regions:
            points = "; ".join(f"{', '.join(p.linears)} ({p.absorb})" for p in r.points)
            blocks = len(set(r.blocks[r.blocks >= 0]))
            how = f"{r.fold_name} in {blocks} blocks: " if r.foldable else "stays: "
            axes = ", ".join(f"{a.param}[{a.axis}]" for a in r.axes)
            lines.append(f"{points} | {how}{axes if r.foldable else '; '.join(r.reasons)}")
        return "\n".join(lines)

    def test_mlp(self) -> None:
        def mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
            h = F.linear(F.layer_norm(x, (16,)), up)
            return x + F.linear(F.gelu(h), down)

        def shown(x: Tensor, up: Tensor, down: Tensor) -> Any:
            h = F.linear(F.layer_norm(x, (16,)), up)
            return x + F.linear(F.gelu(h), down), h

        shapes = ((32, 16), (16, 32))
        self.assertExpectedInline(
            self.regions(mlp, *shapes),
            """\
up_1 (norm) | stays: its input layer_norm carries no channels of a parameter
down_1 (quantize) | fold in 1 blocks: up_1[0], down_1[1]""",
        )
        self.assertExpectedInline(
            self.regions(shown, *shapes),
            """\
up_1 (norm) | stays: its input layer_norm carries no channels of a parameter
down_1 (quantize) | stays: it is visible in the graph's output (linear)""",
        )

    def test_gated_halves(self) -> None:
        def glu(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
            a, b = F.linear(F.layer_norm(x, (16,)), up).chunk(2, -1)
            return x + F.linear(F.silu(a) * b, down)

        def crossed(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
            a, b = F.linear(F.layer_norm(x, (16,)), up).chunk(2, -1)
            return x + F.linear(F.silu(a) * b.flip(-1), down)

        shapes = ((64, 16), (16, 32))
        self.assertExpectedInline(
            self.regions(glu, *shapes),
            """\
up_1 (norm) | stays: its input layer_norm carries no channels of a parameter
down_1 (quantize) | fold in 1 blocks: up_1[0], down_1[1]""",
        )
        self.assertExpectedInline(
            self.regions(crossed, *shapes),
            """\
up_1 (norm) | stays: its input layer_norm carries no channels of a parameter
down_1 (quantize) | stays: mul tells its channels apart""",
        )

    def test_attention(self) -> None:
        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (2, -1)).transpose(1, 2)

        def attention(x: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
            h = F.layer_norm(x, (16,))
            a = F.scaled_dot_product_attention(*(heads(F.linear(h, w)) for w in (q, k, v)))
            return x + F.linear(a.transpose(1, 2).flatten(2), out)

        def turned_values(x: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
            h = F.layer_norm(x, (16,))
            qs, ks, vs = (heads(F.linear(h, w)) for w in (q, k, v))
            a = F.scaled_dot_product_attention(qs, ks, vs * torch.arange(8, dtype=vs.dtype))
            return x + F.linear(a.transpose(1, 2).flatten(2), out)

        shapes = ((16, 16),) * 4
        self.assertExpectedInline(
            self.regions(attention, *shapes),
            """\
q_1, k_1, v_1 (norm) | stays: its input layer_norm carries no channels of a parameter
out_1 (quantize) | fold in 2 blocks: v_1[0], out_1[1]""",
        )
        self.assertExpectedInline(
            self.regions(turned_values, *shapes),
            """\
q_1, k_1, v_1 (norm) | stays: its input layer_norm carries no channels of a parameter
out_1 (quantize) | stays: mul tells its channels apart; scaled_dot_product_attention tells its channels apart""",
        )

    def test_residual_stream(self) -> None:
        def stream(
            x: Tensor,
            embed: Tensor,
            up: Tensor,
            down: Tensor,
            up2: Tensor,
            down2: Tensor,
            final: Tensor,
        ) -> Tensor:
            s = F.linear(x, embed)
            s = s + F.linear(F.gelu(F.linear(F.layer_norm(s, (32,)), up)), down)
            s = s + F.linear(F.gelu(F.linear(F.layer_norm(s, (32,)), up2)), down2)
            return F.linear(F.layer_norm(s, (32,)), final)

        def with_a_table(x: Tensor, *weights: Tensor) -> Tensor:
            return stream_of(x, weights, torch.arange(32, dtype=x.dtype))

        def stream_of(x: Tensor, w: tuple[Tensor, ...], table: Tensor) -> Tensor:
            s = F.linear(x, w[0]) + table
            s = s + F.linear(F.gelu(F.linear(F.layer_norm(s, (32,)), w[1])), w[2])
            return F.linear(F.layer_norm(s, (32,)), w[5])

        shapes = ((32, 16), (48, 32), (32, 48), (48, 32), (32, 48), (16, 32))
        self.assertExpectedInline(
            self.regions(stream, *shapes),
            """\
embed_1 (quantize) | stays: its input x_1 carries no channels of a parameter
up_1 (norm); up2_1 (norm); final_1 (norm) | stream in 1 blocks: embed_1[0], up_1[1], down_1[0], up2_1[1], down2_1[0], final_1[1]
down_1 (quantize) | fold in 1 blocks: up_1[0], down_1[1]
down2_1 (quantize) | fold in 1 blocks: up2_1[0], down2_1[1]""",
        )
        self.assertExpectedInline(
            self.regions(with_a_table, *shapes),
            """\
arg1_1 (quantize) | stays: its input arg0_1 carries no channels of a parameter
arg2_1 (norm) | stays: add tells its channels apart
arg3_1 (quantize) | fold in 1 blocks: arg2_1[0], arg3_1[1]
arg6_1 (norm) | stays: add tells its channels apart""",
        )
