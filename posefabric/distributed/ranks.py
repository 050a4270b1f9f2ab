"""What the processes of a run do together: add, gather, agree. In one process, nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from posefabric.distributed.adder import Adder
from posefabric.distributed.launch import Launch
from posefabric.distributed.shared_sums import SharedSums, open_together
from posefabric.distributed.watch import Watch
from posefabric.structures import PosefabricError

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")


class _Group:
    """The group of this process, as there is one in torch.distributed too."""

    launch = Launch()
    watch: Watch | None = None
    shared: SharedSums | None = None
    looked_for_shared = False


def enter(launch: Launch, watch: Watch) -> None:
    """Called by :func:`posefabric.distributed.session.joined`."""
    _Group.launch, _Group.watch = launch, watch


def close_shared() -> None:
    """Whoever waits for this rank in shared memory learns that it ends."""
    if _Group.shared is not None:
        _Group.shared.close()
    _Group.shared = None


def leave() -> None:
    close_shared()
    _Group.launch, _Group.watch = Launch(), None
    _Group.looked_for_shared = False


def place() -> Launch:
    """This process's place among those that have joined; the only one of one before that."""
    return _Group.launch


def together(work: Callable[[], T]) -> T:
    """A collective operation; RankLost, which names who is gone, when it fails."""
    try:
        return work()
    except RuntimeError as error:
        if _Group.watch is None:
            raise
        raise _Group.watch.lost(error) from error


def barrier() -> None:
    import torch.distributed as dist

    if place().ranks > 1:
        together(dist.barrier)


def summed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The sums over all ranks, of tensors of one device and type, in one operation.

    Every rank gets the same bits.
    """
    import torch

    if place().ranks == 1 or not tensors:
        return list(tensors)
    flat = add_up(torch.cat([tensor.detach().reshape(-1) for tensor in tensors]))
    pieces = flat.split([tensor.numel() for tensor in tensors])
    return [piece.view(t.shape) for piece, t in zip(pieces, tensors, strict=True)]


def add_up(flat: Tensor) -> Tensor:
    """The sum of (n,) over all ranks; may be the tensor given. Every rank gets the same bits."""
    if _Group.launch.ranks == 1:
        return flat
    shared = _shared_for(flat)
    if shared is not None:
        return together(lambda: shared.add(flat))
    import torch.distributed as dist

    together(lambda: dist.all_reduce(flat))
    return flat


def adder() -> Adder:
    """:func:`add_up` for compiled code; its problem is what :func:`together` would raise."""
    shared = _shared()
    if shared is None:
        return Adder.calling(add_up)
    own = shared.adder

    def problem() -> BaseException:
        found, watch = own.problem(), _Group.watch
        return watch.lost(found) if watch and isinstance(found, RuntimeError) else found

    return Adder(own.function, own.context, problem, owner=own)


def _shared_for(tensor: Tensor) -> SharedSums | None:
    if tensor.device.type != "cpu" or not tensor.is_floating_point() or tensor.element_size() < 4:
        return None
    return _shared()


def _shared() -> SharedSums | None:
    """Memory of all ranks, where they are on one machine; opened at the first call, by all."""
    if _Group.launch.ranks == 1:
        return None
    if not _Group.looked_for_shared:
        _Group.looked_for_shared = True
        _Group.shared = open_together(place(), gather)
    return _Group.shared


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up the gradients of all ranks, in place; None stays where no rank has one.

    One operation after the backward pass, not DistributedDataParallel: which parameters take
    part changes from step to step (sparsemax leaves candidates out, alpha rests at first), the
    architecture's own steps run the network several times a step, and every rank's gradient is
    a share of one sum, not a mean to be averaged.
    """
    if place().ranks == 1:
        return
    chosen = [p for p in parameters if p.requires_grad]
    by_type: dict[Any, list[nn.Parameter]] = {}
    for parameter in chosen:
        by_type.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for group in by_type.values():
        _sum_group(group)


def _sum_group(parameters: list[nn.Parameter]) -> None:
    import torch

    present = torch.tensor([float(p.grad is not None) for p in parameters]).to(parameters[0])
    # A gradient keeps its layout, which is its weight's: the optimiser's moments follow it.
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    shared = _shared_for(present)
    if shared is not None:
        own = [_in_order(grad, p) for grad, p in zip(grads, parameters, strict=True)]
        together(lambda: shared.add_in_place([*own, present]))
        for grad, total in zip(grads, own, strict=True):
            if total is not grad:
                grad.copy_(total)
    else:
        *sums, present = summed([*grads, present])
        for grad, total in zip(grads, sums, strict=True):
            grad.copy_(total)
    for parameter, grad, count in zip(parameters, grads, present.tolist(), strict=True):
        parameter.grad = grad if count else None


def _in_order(grad: Tensor, parameter: Tensor) -> Tensor:
    """The gradient without gaps and in its weight's order, which is every rank's; or a copy."""
    import torch

    steps = list(zip(grad.shape, grad.stride(), parameter.stride(), strict=True))
    alike = all(own == other for size, own, other in steps if size > 1)
    is_dense = grad.numel() == 1 + sum((size - 1) * own for size, own, _ in steps)
    return grad if alike and is_dense else torch.empty_like(parameter).copy_(grad)


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on some rank; the same answer on all."""
    import torch

    if place().ranks == 1:
        return flag
    return bool(summed([torch.tensor(int(flag))])[0])


def gather(value: T) -> list[T]:
    """Every rank's value, in the order of ranks, on every rank. Values are pickled."""
    import torch.distributed as dist

    if place().ranks == 1:
        return [value]
    found: list[Any] = [None] * place().ranks
    together(lambda: dist.all_gather_object(found, value))
    return found


def first_told(value: T | None) -> T | None:
    """The value of the first rank that has one."""
    return next((found for found in gather(value) if found is not None), None)


def on_each(work: Callable[[], T]) -> list[T]:
    """Every rank works on what is its own; all have all results, or one PosefabricError.

    Results are pickled.
    """
    if place().ranks == 1:
        return [work()]
    result, problem = None, None
    try:
        result = work()
    except PosefabricError as error:
        problem = error
    found: list[Any] = gather((result, problem))
    for _, told in found:
        if told is not None:
            raise told
    return [result for result, _ in found]


def from_first(work: Callable[[], T]) -> T:
    """Rank 0 works, and all have its result, or its PosefabricError. Results are pickled."""
    import torch.distributed as dist

    if place().ranks == 1:
        return work()
    told: list[Any] = [None, None]
    if place().rank == 0:
        try:
            told[0] = work()
        except PosefabricError as error:
            told[1] = error
    together(lambda: dist.broadcast_object_list(told, src=0))
    if told[1] is not None:
        raise told[1]
    return told[0]


def in_step(items: Iterator[T]) -> Iterator[T]:
    """One item a rank at a time; the PosefabricError of one rank's iterator is raised on all.

    The iterators have the same number of items.
    """
    if place().ranks == 1:
        yield from items
        return
    while True:
        item, problem = None, None
        try:
            item = next(items, None)
        except PosefabricError as error:
            problem = error
        if any_rank(problem is not None):
            told = first_told(problem)
            assert told is not None
            raise told
        if item is None:
            return
        yield item


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Give all ranks rank 0's values, in place."""
    import torch
    import torch.distributed as dist

    if place().ranks == 1:
        return
    with torch.no_grad():
        for tensor in tensors:
            flat = tensor.detach().contiguous()
            together(lambda flat=flat: dist.broadcast(flat, src=0))
            tensor.copy_(flat)


def check_equal(what: str, tensors: Iterable[Tensor]) -> None:
    """PosefabricError when a tensor differs between ranks, in any bit."""
    import torch

    if place().ranks == 1:
        return
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    digests = gather(digest.hexdigest())
    differing = [rank for rank, found in enumerate(digests) if found != digests[0]]
    if differing:
        raise PosefabricError(
            f"{what}: differs on rank {', '.join(map(str, differing))} from rank 0; all processes "
            f"have to see the same files and run the same version of posefabric and torch"
        )
