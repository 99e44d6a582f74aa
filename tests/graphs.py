"""Random networks of the operations that transformers are made of, for properties of the passes.

`random_network(choose)` builds one from a source of choices (`choose(n)` is a number below n: a hypothesis draw, or a
generator's). It keeps a pool of values and applies random moves to members of it; a value stays in the pool, so second
users, shared inputs and dead ends occur by themselves. All weights are parameters, so the traced graph looks like
Dynamo's: parameters first, then inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from pq_fx.passes import _torch

Choose = Callable[[int], int]
Step = Callable[[dict[str, Tensor], list[Tensor]], Tensor]
WIDTHS = (16, 32, 48)
BATCH, TOKENS = 2, (5, 3)
ACTS = (F.gelu, F.silu, F.relu, lambda x: F.gelu(x, approximate="tanh"), torch.tanh)


@dataclass
class Value:
    """A member of the pool: its place in the list of values, its width, and its tokens (0: one row a sample)."""

    at: int
    width: int
    tokens: int


@dataclass
class Network:
    """Shapes of parameters and inputs, and the steps that compute the output from them."""

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    inputs: list[tuple[int, ...]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    moves: list[str] = field(default_factory=list)

    def parameters(self, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """Random parameters."""
        g = torch.Generator().manual_seed(seed)
        return {
            n: (torch.randn(s, generator=g, dtype=torch.float64) / max(s[-1], 4) ** 0.5 + 0.1).to(
                dtype
            )
            for n, s in self.shapes.items()
        }

    def arguments(self, seed: int, dtype: torch.dtype) -> list[Tensor]:
        """Random inputs."""
        g = torch.Generator().manual_seed(seed + 1)
        return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in self.inputs]

    def run(self, params: dict[str, Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
        """The network's outputs."""
        values = list(inputs)
        for step in self.steps:
            values.append(step(params, values))
        return tuple(values[i] for i in self.outputs)

    def trace(self, dtype: torch.dtype) -> tuple[fx.GraphModule, dict[str, str]]:
        """Pre-dispatch ATen with fake values, and the map from placeholders to parameter names."""
        names = list(self.shapes)

        def flat(*args: Tensor) -> tuple[Tensor, ...]:
            return self.run(dict(zip(names, args, strict=False)), list(args[len(names) :]))

        mode = _torch.FakeTensorMode()
        tensors = [torch.empty(s, dtype=dtype) for s in [*self.shapes.values(), *self.inputs]]
        fakes = [mode.from_tensor(t) for t in tensors]
        gm = _torch.trace_pre_dispatch(flat, fakes, mode)
        placeholders = [n.name for n in gm.graph.find_nodes(op="placeholder")]
        return gm, dict(zip(placeholders, names, strict=False))


class Builder:
    """Applies moves to a network under construction."""

    def __init__(self, choose: Choose) -> None:
        self.choose = choose
        self.net = Network()
        self.pool: list[Value] = []
        self.linears: list[tuple[str, bool]] = []
        for tokens in TOKENS:
            width = self.pick(WIDTHS)
            self.pool.append(Value(len(self.net.inputs), 8, tokens))
            self.net.inputs.append((BATCH, tokens, 8))
            del width
        self.vector = Value(2, 8, 0)
        self.net.inputs.append((BATCH, 8))
        self.streams = [self.linear(v, self.pick(WIDTHS)) for v in list(self.pool)]
        self.vector = self.linear(self.vector, 16)
        self.pool = list(self.streams)

    # small parts --------------------------------------------------------------------------------------

    def pick(self, options: tuple | list):
        return options[self.choose(len(options))]

    def yes(self, of: int = 2) -> bool:
        return self.choose(of) == 0

    def add(self, width: int, tokens: int, step: Step) -> Value:
        self.net.steps.append(step)
        return Value(len(self.net.inputs) + len(self.net.steps) - 1, width, tokens)

    def param(self, *shape: int) -> str:
        name = f"p{len(self.net.shapes)}"
        self.net.shapes[name] = shape
        return name

    def linear(self, x: Value, width: int, bias: bool | None = None) -> Value:
        """A linear with or without bias; now and then with the weight of an earlier one of that shape."""
        bias = self.yes() if bias is None else bias
        same = [n for n, _ in self.linears if self.net.shapes[n] == (width, x.width)]
        if same and self.yes(6):
            w = self.pick(same)
        else:
            w = self.param(width, x.width)
            self.linears.append((w, bias))
        b = self.param(width) if bias else None
        at = x.at
        return self.add(width, x.tokens, lambda p, v: F.linear(v[at], p[w], p[b] if b else None))

    def map(self, x: Value, function: Callable[[Tensor], Tensor]) -> Value:
        at = x.at
        return self.add(x.width, x.tokens, lambda p, v: function(v[at]))

    def act(self, x: Value) -> Value:
        return self.map(x, self.pick(ACTS))

    def join(self, x: Value, y: Value, function: Callable[[Tensor, Tensor], Tensor]) -> Value:
        a, b = x.at, y.at
        tokens = max(x.tokens, y.tokens)
        spread = x.tokens != y.tokens  # a vector is spread over tokens
        return self.add(
            x.width, tokens, lambda p, v: function(v[a], v[b].unsqueeze(1) if spread else v[b])
        )

    def slice(self, x: Value, start: int, size: int) -> Value:
        at = x.at
        return self.add(size, x.tokens, lambda p, v: v[at][..., start : start + size])

    def norm(self, x: Value) -> Value:
        """layer_norm or rms_norm, affine or not, or an RMS norm written by hand with casts."""
        at, width, kind = x.at, x.width, self.choose(5)
        w = self.param(width) if self.yes() else None
        b = self.param(width) if w and self.yes() else None

        def layer(p: dict, v: list) -> Tensor:
            return F.layer_norm(v[at], (width,), p[w] if w else None, p[b] if b else None, 1e-6)

        def rms(p: dict, v: list) -> Tensor:
            return F.rms_norm(v[at], (width,), p[w] if w else None, 1e-6)

        def by_hand(p: dict, v: list) -> Tensor:
            x = v[at].to(torch.float64)
            y = (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).to(v[at].dtype)
            return y * p[w] if w else y

        return self.add(width, x.tokens, (layer, layer, rms, rms, by_hand)[kind])

    def modulate(self, x: Value) -> Value:
        """norm(x) * (1 + scale) + shift with rows made from the vector."""
        n = self.norm(x)
        rows = self.linear(self.act(self.vector), 2 * x.width)
        scale, shift = self.slice(rows, 0, x.width), self.slice(rows, x.width, x.width)
        n = self.join(n, scale, lambda a, s: a * (1 + s))
        return self.join(n, shift, lambda a, s: a + s)

    def ready(self, x: Value) -> Value:
        """x, mostly normalized first, as blocks do."""
        return (self.norm, self.modulate, self.norm, lambda v: v)[self.choose(4)](x)

    def residual(self, x: Value, y: Value) -> Value:
        if self.yes(3):
            gate = self.linear(self.vector, x.width)
            y = self.join(y, gate, lambda a, g: a * g)
        return self.join(x, y, torch.add)

    # moves: each makes one new member of the pool -----------------------------------------------------

    def move_mlp(self, x: Value) -> Value:
        h = self.act(self.linear(self.ready(x), self.pick(WIDTHS)))
        if self.yes(3):
            h = self.map(h, lambda t: F.dropout(t, 0.0))
        return self.residual(x, self.linear(h, x.width))

    def move_glu(self, x: Value) -> Value:
        r, width, first = self.ready(x), self.pick(WIDTHS), self.yes()
        if self.yes():  # one linear, cut in two
            both = self.linear(r, 2 * width)
            at = both.at
            halves = [
                self.add(width, x.tokens, lambda p, v, i=i: v[at].chunk(2, dim=-1)[i])
                for i in (0, 1)
            ]
        else:
            halves = [self.linear(r, width), self.linear(r, width)]
        a, b = halves if first else halves[::-1]
        h = self.join(self.act(a), b, torch.mul)
        return self.residual(x, self.linear(h, x.width))

    def move_attention(self, x: Value) -> Value:
        """Attention over one stream, or jointly over both; grouped queries now and then; sdpa or matmul."""
        others = [s for s in self.pool if s.tokens and s.tokens != x.tokens]
        streams = [x, self.pick(others)] if others and self.yes() else [x]
        heads, dim, group = 4, self.pick((4, 8)), self.pick((1, 1, 2))
        parts: list[list[Value]] = []
        for s in streams:
            r = self.ready(s)
            parts.append([self.linear(r, n * dim) for n in (heads, heads // group, heads // group)])
        if self.yes(3):  # QK norm within heads
            for own in parts:
                own[0] = self.head_norm(own[0], dim)
        ats = [[p.at for p in own] for own in parts]
        tokens = sum(s.tokens for s in streams)
        by_matmul, mixed = self.yes(4), self.yes()

        def attend(p: dict, v: list) -> Tensor:
            q, k, w = (
                torch.cat([v[own[i]].unflatten(-1, (-1, dim)) for own in ats], 1).transpose(1, 2)
                for i in range(3)
            )
            if group > 1 and mixed:
                k, w = (t.repeat_interleave(group, dim=1) for t in (k, w))
            if by_matmul and (group == 1 or mixed):
                out = torch.softmax(q @ k.transpose(-1, -2), -1) @ w
            else:
                grouped = group > 1 and not mixed
                out = F.scaled_dot_product_attention(q, k, w, enable_gqa=grouped)
            return out.transpose(1, 2).flatten(2)

        whole = self.add(heads * dim, tokens, attend)
        if len(streams) == 1:
            return self.residual(x, self.linear(whole, x.width))
        at, cut = whole.at, x.tokens
        mine = self.add(whole.width, cut, lambda p, v: v[at][:, :cut])
        rest = self.add(whole.width, tokens - cut, lambda p, v: v[at][:, cut:])
        self.pool.append(self.residual(streams[1], self.linear(rest, streams[1].width)))
        return self.residual(x, self.linear(mine, x.width))

    def head_norm(self, x: Value, dim: int) -> Value:
        w, at = self.param(dim), x.at
        return self.add(
            x.width,
            x.tokens,
            lambda p, v: F.rms_norm(v[at].unflatten(-1, (-1, dim)), (dim,), p[w], 1e-6).flatten(-2),
        )

    def move_parallel(self, x: Value) -> Value:
        """FLUX's single block: attention's output and an MLP joined along channels before one linear."""
        r = self.ready(x)
        a, h = self.linear(r, 16), self.act(self.linear(r, self.pick(WIDTHS)))
        i, j = (a.at, h.at) if self.yes() else (h.at, a.at)
        both = self.add(a.width + h.width, x.tokens, lambda p, v: torch.cat([v[i], v[j]], -1))
        return self.residual(x, self.linear(both, x.width))

    def move_convolution(self, x: Value) -> Value:
        """1x1 convolution, gate or act, depthwise convolution over tokens, 1x1 convolution."""
        width, gated = self.pick(WIDTHS), self.yes()
        up, down = (
            self.param(width * (2 if gated else 1), x.width, 1),
            self.param(x.width, width, 1),
        )
        inner = width * (2 if gated else 1)
        depth, bias = self.param(inner, 1, 3), self.param(inner) if self.yes() else None
        at, act = self.ready(x).at, self.pick(ACTS)

        def step(p: dict, v: list) -> Tensor:
            h = F.conv1d(v[at].transpose(1, 2), p[up])
            h = F.conv1d(act(h), p[depth], p[bias] if bias else None, padding=1, groups=inner)
            if gated:
                a, b = h.chunk(2, dim=1)
                h = a * act(b)
            return F.conv1d(h, p[down]).transpose(1, 2)

        return self.residual(x, self.add(x.width, x.tokens, step))

    def move_pieces(self, x: Value) -> Value:
        """A linear's output cut at an uneven place; the pieces are read apart or joined in another order."""
        whole = self.linear(self.ready(x), 48)
        a, b = self.slice(whole, 0, 16), self.slice(whole, 16, 32)
        if self.yes():
            a = self.act(a)
        if self.yes():
            i, j = b.at, a.at
            joined = self.add(48, x.tokens, lambda p, v: torch.cat([v[i], v[j]], -1))
            return self.linear(joined, x.width)
        return self.join(self.linear(a, x.width), self.linear(b, x.width), torch.add)

    def move_tokens(self, x: Value) -> Value:
        """Both streams joined along tokens after a norm, one linear over both, and the first part cut out again."""
        others = [s for s in self.pool if s.tokens and s.tokens != x.tokens and s.width == x.width]
        if not others:
            return self.move_mlp(x)
        i, j = self.ready(x).at, self.ready(self.pick(others)).at
        n = x.tokens
        both = self.add(x.width, 8, lambda p, v: torch.cat([v[i], v[j]], 1))
        at = self.act(self.linear(both, 32)).at
        return self.linear(self.add(32, n, lambda p, v: v[at][:, :n]), x.width)

    def move_odd(self, x: Value) -> Value:
        """What real graphs hold now and then: shuffles, reductions, parameters read directly, writes in place."""
        h = self.linear(x, 16)
        p = self.param(16)
        at = h.at
        odd: list[Step] = [
            lambda q, v: v[at].unflatten(-1, (4, 4)).transpose(-1, -2).flatten(-2),
            lambda q, v: v[at] * q[p] + q[p],
            lambda q, v: v[at] + v[at].mean(1, keepdim=True),
            lambda q, v: v[at].softmax(-1),
            lambda q, v: torch.flip(v[at], (-1,)),
            lambda q, v: v[at].clone().mul_(2.0).add_(v[at]),
            lambda q, v: torch.stack([v[at], -v[at]], -1).sum(-1) + v[at].cumsum(-1),
            lambda q, v: v[at].repeat(1, 1, 2)[..., :16] * v[at].amax(-1, keepdim=True),
            lambda q, v: F.pad(v[at], (0, 4))[..., 2:18],
            lambda q, v: torch.where(v[at] > 0, v[at], v[at] * 0.1).expand(BATCH, -1, -1),
            lambda q, v: v[at].reshape(BATCH, -1, 2, 8).unbind(2)[1].repeat_interleave(2, -1),
            lambda q, v: v[at] * torch.arange(16, dtype=v[at].dtype),
        ]
        return self.linear(self.act(self.add(16, x.tokens, self.pick(odd))), x.width)


MOVES = ("mlp", "glu", "attention", "parallel", "convolution", "pieces", "tokens", "odd")


def random_network(choose: Choose) -> Network:
    """A network of two to five moves."""
    b = Builder(choose)
    for _ in range(2 + choose(4)):
        name, x = b.pick(MOVES), b.pick(b.pool)
        b.net.moves.append(name)
        b.pool.append(getattr(b, f"move_{name}")(x))
    last = b.pool[-1]
    final = b.linear(b.norm(last), 8)
    b.net.outputs = [final.at] + ([b.pick(b.pool).at] if b.yes(4) else [])
    return b.net
