"""Partial channels: what a restricted candidate computes and trains, and when it is restricted."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from networks import make_supernet, noise
from test_strategies import generator
from torch import nn
from trainings import make_config, make_trainer

from posefabric.config import SearchConfig
from posefabric.models.partial import PartialCell, partial_path
from posefabric.models.supernet import Supernet
from posefabric.search.partial_channels import PartialChannels
from posefabric.train.phase import choose_path


def one_cell(*operations: str) -> tuple[Supernet, PartialCell]:
    """A network whose one fabric is its last cell alone, of 8 channels."""
    parts = {"all": (0, 1, 2, 3)}
    network = make_supernet(operations=operations, first_layer=5, parts=parts).double().train()
    (cell,) = partial_path(network)
    return network, cell


def nodes_of(network: Supernet, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Node 0 and node 1 of the one cell."""
    (cell,) = (m for m in network.modules() if isinstance(m, PartialCell))
    seen: list[dict] = []
    leave = type(cell).leave  # type: ignore[attr-defined]
    object.__setattr__(cell, "leave", lambda hidden: (seen.append(hidden), leave(cell, hidden))[1])
    network(images)
    return seen[0][0], seen[0][1]


@pytest.mark.parametrize("operation", ["dil_conv_3x3", "conv_3x3", "max_pool_3x3", "skip"])
def test_a_restricted_candidate_is_the_whole_one_on_these_channels(operation: str) -> None:
    network, cell = one_cell(operation)
    channels = torch.tensor([1, 4, 6])
    cell.channels = channels
    (whole,) = (
        copy.deepcopy(m[operation]) for m in network.modules() if isinstance(m, nn.ModuleDict)
        and operation in m
    )  # fmt: skip
    start, end = nodes_of(network, noise(2, 3, 64, 64))
    others = [i for i in range(start.shape[1]) if i not in channels.tolist()]
    assert torch.equal(end[:, others], start[:, others]), "the others pass by"
    masked = torch.zeros_like(start)
    masked[:, channels] = start[:, channels]
    # One operation alone weighs 1. One layer of channels is linear in those that are not masked.
    expected = whole(masked)[:, channels]
    if operation == "max_pool_3x3":
        expected = whole(start)[:, channels]
    assert torch.allclose(end[:, channels], expected, atol=1e-10)


def test_only_the_drawn_rows_and_columns_learn() -> None:
    network, cell = one_cell("dil_conv_3x3")
    before = {name: b.clone() for name, b in network.named_buffers()}
    channels = torch.tensor([0, 5])
    cell.channels = channels
    network(noise(2, 3, 64, 64)).square().sum().backward()
    others = [i for i in range(8) if i not in channels.tolist()]
    found = 0
    for name, parameter in network.named_parameters():
        if "dil_conv_3x3" in name:
            assert parameter.grad is not None
            assert parameter.grad[channels].abs().sum() > 0 and not parameter.grad[others].any()
            if parameter.shape[1] == 8:
                assert not parameter.grad[:, others].any()
            found += 1
    assert found == 2
    for name, buffer in network.named_buffers():
        if "dil_conv_3x3" in name and buffer.ndim:
            changed = (buffer != before[name]).nonzero().flatten().tolist()
            assert changed == channels.tolist()
        elif "dil_conv_3x3" in name:
            assert buffer == before[name] + 1


def test_all_channels_are_the_plain_cell() -> None:
    plain = make_supernet(hidden_nodes=1, shared_alpha=False).double().train()
    images = noise(2, 3, 64, 64)
    network = copy.deepcopy(plain)
    strategy = PartialChannels(SearchConfig(partial_share=1.0, partial_until=1.0))
    strategy.prepare(network, generator(0))
    strategy.schedule(network, 0.0)
    # What is restricted has no bypass when nothing is left to pass.
    found, expected = network(images), plain(images)
    assert torch.allclose(found, expected, atol=1e-10)
    found.sum().backward()
    expected.sum().backward()
    gradients = {name: p.grad for name, p in network.named_parameters()}
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(gradients[name], parameter.grad, atol=1e-8), name
    for name, buffer in plain.named_buffers():
        assert torch.allclose(network.get_buffer(name).double(), buffer.double()), name


def test_the_draw_comes_from_seed_and_progress_and_ends() -> None:
    def drawn(seed: int, progress: float) -> list[list[int] | None]:
        network = make_supernet()
        strategy = PartialChannels(SearchConfig(partial_share=0.25, partial_until=0.5))
        strategy.prepare(network, generator(seed))
        strategy.schedule(network, progress)
        cells = [m for m in network.modules() if isinstance(m, PartialCell)]
        return [None if c.channels is None else c.channels.tolist() for c in cells]

    first = drawn(0, 0.1)
    assert first == drawn(0, 0.1)
    assert first != drawn(1, 0.1) and first != drawn(0, 0.2)
    widths = [
        m.graph.width  # type: ignore[attr-defined]
        for m in make_supernet().modules()
        if type(m).__name__ == "Cell"
    ]
    assert [len(channels or []) for channels in first] == [width // 4 for width in widths]
    assert set(map(str, drawn(0, 0.5))) == {"None"}


def test_evaluation_sees_all_channels() -> None:
    network = make_supernet().double().eval()
    images = noise(2, 3, 64, 64)
    with torch.no_grad():
        expected = network(images)
        strategy = PartialChannels(SearchConfig())
        strategy.prepare(network, generator(0))
        strategy.schedule(network, 0.0)
        assert torch.equal(network(images), expected)


@pytest.mark.parametrize("path", ["fast", "plain"])
def test_a_search_trains_partially_then_whole(tmp_path: Path, path: str) -> None:
    search = dict(strategy="partial_channels", log_every=1)
    config = make_config(model=dict(path=path), search=search)
    trainer = make_trainer(tmp_path / "run", config)
    choose_path(trainer.network, config, torch.device("cpu"))
    trainer.fit()
    records = trainer.run.metrics()
    whole = ["mixture_macs" in record for record in records]
    assert True in whole and False in whole and whole == sorted(whole)
    assert all(math.isfinite(record["loss"]) for record in records)
    moved = trainer.network.arch_parameters()  # type: ignore[operator]
    assert any(float(p.detach().abs().max()) > 0 for p in moved.values())
