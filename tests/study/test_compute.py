"""What trainings cost, and epochs for an equal cost."""

from __future__ import annotations

import pytest
from trainings import make_config

from posefabric.models.build import build_baseline
from posefabric.study.compute import epochs_for, network_macs, passes_of, total_cost


def test_a_cost_is_passes_by_persons_by_macs() -> None:
    phases = [
        {"passes": 5, "persons": 100, "macs": 7, "seconds": 1},
        {"passes": 1, "persons": 30, "macs": 2, "seconds": 1},
    ]
    assert total_cost(phases) == 5 * 100 * 7 + 30 * 2
    # docs/method.md: one more forward and backward pass, and four more.
    assert [passes_of(s) for s in ("synchronous", "first_order", "second_order")] == [1, 2, 5]


def test_epochs_for_a_cost() -> None:
    # 18 persons in batches of 4: 4 steps an epoch, the rest is dropped.
    config = make_config(data=dict(synthetic_train=18))
    assert epochs_for(4 * 10 * 6, macs=10, config=config) == pytest.approx(6 / 4)
    assert epochs_for(4 * 10 * 6 + 19, macs=10, config=config) == pytest.approx(6 / 4)
    assert epochs_for(4 * 10 * 6 + 21, macs=10, config=config) == pytest.approx(7 / 4)
    assert epochs_for(0, macs=10, config=config) == pytest.approx(1 / 4)


def test_macs_grow_with_the_pixels() -> None:
    model = dict(network="simple_baseline", deconv_width=4)
    small = make_config(model=model)
    large = make_config(model=model, data=dict(input_wh=[128, 64]))
    network = build_baseline(small).train()
    # Squeeze-and-excitation costs the same at any size.
    twice = 2 * network_macs(network, small)
    assert network_macs(network, large) == pytest.approx(twice, rel=0.01)
