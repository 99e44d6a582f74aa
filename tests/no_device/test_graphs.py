"""Random graphs (tests/graphs.py): folding random permutations gives the same network, whatever the graph.

300 graphs here; 10,000 by `python bench/fuzz_graphs.py`.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from graph_properties import check, check_lowering
from graphs import random_network
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pq_fx.passes import rules
from pq_fx.passes.channels import Propagation

aten = torch.ops.aten
SETTINGS = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def draw(data: st.DataObject):
    return random_network(lambda n: data.draw(st.integers(0, n - 1)))


@settings(SETTINGS, max_examples=300)
@given(st.data())
def test_folding_and_observing_change_nothing(data: st.DataObject) -> None:
    check(draw(data), data.draw(st.integers(0, 1000)), Counter())


@settings(SETTINGS, max_examples=60)
@given(st.data())
def test_lowering_changes_nothing(data: st.DataObject) -> None:
    check_lowering(draw(data), data.draw(st.integers(0, 1000)), Counter())


def heads_alike(state: Propagation, node: torch.fx.Node) -> object:
    """Attention's rule, but for telling heads apart."""
    state.tell_apart = lambda *_: None
    try:
        return ATTENTION(state, node)
    finally:
        del state.tell_apart


ATTENTION = rules.RULES[aten.scaled_dot_product_attention.default]


@pytest.mark.parametrize(
    ("target", "wrong"),
    [
        # a norm's weight not moved with its channels
        (aten.rms_norm.default, lambda state, node: rules.value_of(state, node.args[0])),
        # value channels exchanged between heads
        (aten.scaled_dot_product_attention.default, heads_alike),
        # channels in other order not noticed
        (aten.flip.default, lambda state, node: rules.value_of(state, node.args[0])),
    ],
    ids=["norm", "attention", "flip"],
)
def test_the_property_finds_a_wrong_rule(
    target: object, wrong: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(rules.RULES, target, wrong)
    found = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        try:
            check(random_network(lambda n, rng=rng: int(rng.integers(n))), seed, Counter())
        except AssertionError:
            found += 1
            break
    assert found


def test_forgetting_to_pin_outputs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    pin = Propagation.pin

    def careless(self: Propagation, labels: object, reason: str) -> None:
        if "graph's output" not in reason:
            pin(self, labels, reason)

    monkeypatch.setattr(Propagation, "pin", careless)
    failed = False
    for seed in range(60):
        rng = np.random.default_rng(seed)
        try:
            check(random_network(lambda n, rng=rng: int(rng.integers(n))), seed, Counter())
        except AssertionError:
            failed = True
            break
    assert failed
