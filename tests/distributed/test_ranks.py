"""Collective operations: the same answer on every rank, and errors that all learn of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import in_ranks
from torch import Tensor, nn

from posefabric.distributed import (
    any_rank,
    broadcast,
    check_equal,
    first_told,
    from_first,
    gather,
    in_step,
    on_each,
    place,
    ranks,
    shared_sums,
    sum_gradients,
    summed,
)
from posefabric.structures import DataError, PosefabricError


def caught(work: Any) -> str:
    try:
        return f"no error but {work()}"
    except PosefabricError as error:
        return f"{type(error).__name__}: {error}"


def failing_on(rank: int) -> Any:
    if place().rank == rank:
        raise DataError(f"picture {rank} is bad")
    return place().rank


def items() -> Iterator[int]:
    yield 10 + place().rank
    failing_on(1)
    yield 20 + place().rank


def test_every_rank_gets_the_same_answers(tmp_path: Path) -> None:
    def work(rank: int) -> dict[str, Any]:
        weight = nn.Parameter(torch.full((2, 3, 1, 1), 1.0).to(memory_format=torch.channels_last))
        unused, one_sided = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
        frozen = nn.Parameter(torch.ones(1), requires_grad=False)
        weight.grad = torch.arange(6.0).view(2, 3, 1, 1) * (rank + 1)
        if rank == 1:
            one_sided.grad = torch.tensor([5.0, 7.0])
        sum_gradients([weight, unused, one_sided, frozen])
        value = torch.full((2, 3), float(rank)).t()
        broadcast([value])
        seen: list[int] = []
        return {
            "summed": [t.tolist() for t in summed([torch.ones(2) * rank, torch.ones(1, 1)])],
            "weight": weight.grad.flatten().tolist(),
            "unused": unused.grad,
            "one_sided": one_sided.grad,
            "broadcast": value.tolist(),
            "gathered": gather(f"rank {rank}"),
            "any": [any_rank(False), any_rank(rank == 1)],
            "first_told": first_told("it" if rank == 1 else None),
            "from_first": from_first(lambda: f"worked on {place().rank}"),
            "on_each": on_each(lambda: place().rank * 2),
            "each_fails": caught(lambda: on_each(lambda: failing_on(1))),
            "first_fails": caught(lambda: from_first(lambda: failing_on(0))),
            "items": caught(lambda: [seen.append(item) for item in in_step(items())]),
            "seen": seen,
            "equal": caught(lambda: check_equal("weights", [torch.ones(2)])),
            "different": caught(lambda: check_equal("weights", [torch.ones(2) + rank / 1e6])),
        }

    first, second = in_ranks(work, tmp_path)
    assert first["seen"] == [10] and second["seen"] == [11]
    for found in (first, second):
        assert found["summed"] == [[1.0, 1.0], [[2.0]]]
        assert found["weight"] == [0.0, 3.0, 6.0, 9.0, 12.0, 15.0]
        assert found["unused"] is None and found["one_sided"].tolist() == [5.0, 7.0]
        assert found["broadcast"] == [[0.0, 0.0]] * 3
        assert found["gathered"] == ["rank 0", "rank 1"]
        assert found["any"] == [False, True]
        assert found["first_told"] == "it" and found["from_first"] == "worked on 0"
        assert found["on_each"] == [0, 2]
        assert found["each_fails"] == found["items"] == "DataError: picture 1 is bad"
        assert found["first_fails"] == "DataError: picture 0 is bad"
        assert found["equal"] == "no error but None"
        assert "weights: differs on rank 1 from rank 0" in found["different"]


@pytest.mark.parametrize("shared", [True, False], ids=["shared memory", "gloo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_any_size_and_layout(
    dtype: torch.dtype, shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than shared memory takes at a time, nothing at all, and another layout on one rank."""
    if not shared:
        monkeypatch.setattr(ranks, "open_together", lambda launch, gather: None)
    large = shared_sums.ROOM // 8
    shapes = [(3,), (large - 1,), (0,), (4, 3, 3, 3), (large, 5), (), (2, 1, 3, 3)]

    def gradient(shape: tuple[int, ...], rank: int) -> Tensor:
        generator = torch.Generator().manual_seed(10 * len(shape) + rank)
        return torch.randn(shape, generator=generator, dtype=dtype)

    def work(rank: int) -> list[Tensor | None]:
        parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
        for parameter, shape in zip(parameters, shapes, strict=True):
            parameter.grad = gradient(shape, rank)
            if rank == 1 and len(shape) == 4:
                parameter.grad = parameter.grad.to(memory_format=torch.channels_last)
        sum_gradients(parameters)
        assert (ranks._Group.shared is not None) == shared
        return [parameter.grad for parameter in parameters]

    first, second = in_ranks(work, tmp_path)
    for shape, a, b in zip(shapes, first, second, strict=True):
        assert torch.equal(a, gradient(shape, 0) + gradient(shape, 1))
        assert torch.equal(a, b)


def test_one_process_needs_no_group() -> None:
    tensor = torch.ones(2)
    assert place().ranks == 1
    assert summed([tensor])[0] is tensor
    assert gather(3) == [3] == on_each(lambda: 3)
    assert from_first(lambda: 4) == 4 and any_rank(True) and not any_rank(False)
    assert list(in_step(iter([1, 2]))) == [1, 2]
    broadcast([tensor])
    check_equal("this", [tensor])
    with pytest.raises(DataError):
        from_first(lambda: failing_on(0))
