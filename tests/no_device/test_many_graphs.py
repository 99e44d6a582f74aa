"""One model in many graphs, backends and threads: the same numbers, and a word where Dynamo gives up."""

from __future__ import annotations

import gc
import logging
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
import toy
from torch import Tensor, nn
from toy import CONFIG, SAME, out, quantized, relative

import pq_fx
from pq_fx.modules import quantized_linears
from pq_fx.passes import _torch


def test_beyond_the_recompile_limit_the_numbers_stay_right() -> None:
    from torch._dynamo import config

    model = quantized(toy.toy())
    torch._dynamo.reset()
    toy.compiled.clear()
    with config.patch(recompile_limit=2):
        compiled = torch.compile(model, backend=toy.lowering_backend, dynamic=False)
        for tokens in range(3, 9):
            assert relative(out(compiled, tokens=tokens), out(model, tokens=tokens)) < SAME
    assert len(toy.compiled) == 2


def test_blocks_beyond_the_recompile_limit_are_said_to_run_eagerly(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, no_codegen: list[int]
) -> None:
    """Regional compilation: the blocks share one function, and differ here in their formats."""
    from torch._dynamo import config
    from torch._dynamo.exc import FailOnRecompileLimitHit

    formats = "int4", "int8", "nvfp4", "mxfp4"
    rules = {rf"re:blocks\.{i}\..*": name for i, name in enumerate(formats)}
    model = quantized(toy.toy(blocks=4), pq_fx.QuantConfig(rules=rules, method="rtn"))
    want = out(model)
    dynamo = logging.getLogger("torch._dynamo")
    monkeypatch.setattr(dynamo, "propagate", True)
    with config.patch(recompile_limit=2):
        pq_fx.compile_blocks(model)
        caplog.clear()
        assert relative(out(model), want) < SAME
        assert no_codegen == [2]
        ours = [r.getMessage() for r in caplog.records if r.name == "pq_fx"]
        (said,) = (m for m in ours if "last graph that Dynamo compiles of Block.forward" in m)
        assert "run eagerly: the same numbers, but slowly" in said
        assert any("recompile_limit (2)" in r.getMessage() for r in caplog.records)  # Dynamo's own
        torch._dynamo.reset()
        pq_fx.compile_blocks(model, fullgraph=True)
        with pytest.raises(FailOnRecompileLimitHit):
            out(model)


def test_two_backends_and_new_shapes_in_one_process() -> None:
    from torch._dynamo import config

    model = quantized(toy.toy(blocks=1))
    backends = toy.lowering_backend, "eager", "aot_eager"
    ways = [torch.compile(model, backend=b, fullgraph=True) for b in backends]
    with config.patch(recompile_limit=64):  # one count for all backends of one function
        for batch, tokens in ((2, 7), (64, 9), (1, 1), (2, 7)):
            want = out(model, batch=batch, tokens=tokens)
            for way in ways:
                assert relative(out(way, batch=batch, tokens=tokens), want) < SAME


@pytest.mark.usefixtures("no_codegen")
def test_new_shapes_after_the_float_weights_are_gone() -> None:
    """First calls convert the model that Dynamo's first graphs were made of."""
    model = toy.toy()
    float_weights = [weakref.ref(m.weight) for m in model.blocks.modules() if type(m) is nn.Linear]
    compiled = torch.compile(
        model, backend="permuquant", options=CONFIG.to_dict() | {"calibration_steps": 2}
    )
    for _ in range(2):
        out(compiled)
    gc.collect()
    assert len(quantized_linears(model)) == len(float_weights) == 12
    assert not [ref for ref in float_weights if ref() is not None]
    for tokens in (7, 12, 3):
        for batch in (2, 1):
            shape = {"tokens": tokens, "batch": batch}
            assert relative(out(compiled, **shape), out(model, **shape)) < SAME


# Threads ---------------------------------------------------------------------------------------------

THREADS = 4


def at_once(work: Callable[[int], Any], count: int = THREADS) -> Sequence[Any]:
    """Results of `work(0)`, `work(1)`, ... which begin together, each in a thread of its own."""
    barrier = Barrier(count)

    def begin(i: int) -> Any:
        barrier.wait()
        with torch.no_grad():  # grad mode is a thread's own
            return work(i)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(begin, range(count)))


def outputs(model: nn.Module, i: int) -> list[Tensor]:
    """Three calls whose batch and length are this thread's own."""
    return [model(toy.rows(10 * i + n, batch=1 + i, tokens=5 + i + n)) for n in range(3)]


@pytest.mark.parametrize("compiled", [False, True])
def test_one_quantized_model_in_many_threads(compiled: bool) -> None:
    model = toy.quantized(toy.toy())
    call = torch.compile(model, backend=toy.lowering_backend, dynamic=True) if compiled else model
    for i, found in enumerate(at_once(lambda i: outputs(call, i))):
        with torch.no_grad():
            for got, want in zip(found, outputs(model, i), strict=True):
                assert toy.relative(got, want) < 1e-5


def test_models_that_are_quantized_at_once_are_those_quantized_alone() -> None:
    def quantize(i: int) -> dict[str, Tensor]:
        return toy.quantized(toy.toy(i)).state_dict()

    together = at_once(quantize)
    for i in range(THREADS):
        torch._dynamo.reset()
        alone = quantize(i)
        assert alone.keys() == together[i].keys()
        for name, value in alone.items():
            assert torch.equal(value.float(), together[i][name].float()), name
    assert torch._dynamo.config.recompile_limit == 8  # raised while calibrating


@pytest.mark.parametrize("shared", [False, True])
def test_threads_leave_the_limit_as_it_was(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In torch 2.11 a limit is one for all threads: it stays raised until the last of them is done."""
    from torch._dynamo import config

    if shared:
        monkeypatch.setattr(_torch, "_threads_share_settings", lambda: True)
        first, second = _torch.every_graph(), _torch.every_graph()
        for step in (first.__enter__, second.__enter__, lambda: first.__exit__(None, None, None)):
            step()
            assert config.recompile_limit > 8
        second.__exit__(None, None, None)
    else:
        barrier = Barrier(THREADS)

        def work(i: int) -> None:
            barrier.wait()
            with _torch.every_graph():
                barrier.wait()
                assert config.recompile_limit > 8
                time.sleep(0.01 * i)  # they leave in the order in which they came
                assert config.recompile_limit > 8

        at_once(work)
    assert config.recompile_limit == 8


def test_a_calibration_counts_calls_of_many_threads_whole() -> None:
    def work(model: nn.Module, i: int) -> None:
        if (
            i == THREADS - 1
        ):  # this one's calls fail half way, and take nothing of the others' with them
            for _ in range(3):
                with pytest.raises(Exception, match="size|shape"):
                    model(torch.randn(1, 5, 9))
        else:
            outputs(model, i)

    def statistics(run: Callable[[Callable[[int], Any]], Any]) -> pq_fx.statistics.Statistics:
        torch._dynamo.reset()
        model = toy.toy()
        quantizer = pq_fx.prepare(model, toy.CONFIG)
        with torch.no_grad(), quantizer.calibrate(progress=False):
            run(lambda i: work(model, i))
        return quantizer.statistics()

    one = statistics(lambda run: [run(i) for i in range(THREADS)])
    many = statistics(at_once)
    assert many.calls == one.calls == 3 * (THREADS - 1)
    for name, alone in one.moments.items():
        found = many.moments[name]
        assert torch.equal(found.count, alone.count) and torch.equal(found.calls, alone.calls)
        assert torch.equal(found.amax, alone.amax)
        assert toy.relative(found.sum_squares, alone.sum_squares) < 1e-5  # sums in another order
