"""Synchronised batch norms compute what torch's do, in every layout and precision."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import in_ranks
from torch import Tensor, nn

from posefabric.distributed import place, share
from posefabric.structures import PosefabricError
from posefabric.train.synchronised import synchronised_norms

SHAPES = [(4, 6, 5, 3), (2, 3, 1, 2), (8, 4)]


def passes(x: Tensor, norm: nn.Module, *, synchronised: bool) -> list[Any]:
    """Output, gradients and statistics of two steps."""
    x = x.clone().requires_grad_()
    mode = synchronised_norms() if synchronised else contextlib.nullcontext()
    with mode:
        for _ in range(2):
            output = norm(x)
        wide = output.to(torch.promote_types(output.dtype, torch.float32))
        (wide**3).sum().backward()
    gradients = [x.grad, *(p.grad for p in norm.parameters())]
    return [output.detach(), *gradients, *norm.buffers()]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_one_rank_is_torch(shape: tuple[int, ...], channels_last: bool, affine: bool) -> None:
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3 + 9
    if channels_last:
        if len(shape) != 4:
            return
        x = x.contiguous(memory_format=torch.channels_last)
    found = []
    for synchronised in (False, True):
        kind = nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d
        norm = kind(shape[1], affine=affine, momentum=0.3).double()
        if affine:
            nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
        found.append(passes(x, norm, synchronised=synchronised))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-11)
    assert found[1][0].is_contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype: torch.dtype) -> None:
    x = (torch.randn(4, 6, 5, 3, generator=torch.Generator().manual_seed(0)) + 2).to(dtype)
    one, two = (passes(x, nn.BatchNorm2d(6), synchronised=s) for s in (False, True))
    for a, b in zip(one, two, strict=True):
        assert a.dtype == b.dtype
        scale = float(a.abs().max()) + 1e-6
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
        assert float((a - b).abs().max()) < tolerance * scale


def test_torchs_function_comes_back() -> None:
    before = nn.functional.batch_norm
    with pytest.raises(KeyError), synchronised_norms():
        assert nn.functional.batch_norm is not before
        raise KeyError
    assert nn.functional.batch_norm is before


def test_evaluation_is_left_alone() -> None:
    norm, x = nn.BatchNorm2d(3).eval(), torch.randn(2, 3, 4, 4)
    with synchronised_norms():
        found = norm(x)
    assert torch.equal(found, norm(x))


def test_ranks_of_unequal_shares_are_the_whole_batch(tmp_path: Path) -> None:
    x = torch.randn(5, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def work(rank: int) -> list[Any]:
        return passes(x[share(5, place())], nn.BatchNorm2d(3).double(), synchronised=True)

    expected = passes(x, nn.BatchNorm2d(3).double(), synchronised=False)
    ranks = in_ranks(work, tmp_path)
    for place_in_list in (0, 1):  # output, gradient of the input
        joined = torch.cat([found[place_in_list] for found in ranks])
        torch.testing.assert_close(joined, expected[place_in_list], rtol=1e-9, atol=1e-11)
    for place_in_list in (2, 3):  # weight, bias: shares of a sum
        total = ranks[0][place_in_list] + ranks[1][place_in_list]
        torch.testing.assert_close(total, expected[place_in_list], rtol=1e-9, atol=1e-11)
    for one, two, whole in zip(ranks[0][4:], ranks[1][4:], expected[4:], strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, whole, rtol=1e-9, atol=1e-11)


def test_one_value_a_channel_is_told() -> None:
    with synchronised_norms(), pytest.raises(PosefabricError, match="one value a channel"):
        nn.BatchNorm2d(2)(torch.ones(2, 2, 1, 1)[:1].expand(1, 2, 1, 1))
