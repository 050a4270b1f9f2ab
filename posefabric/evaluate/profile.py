"""What a network costs: parameters, multiply-adds, and latency measured side by side."""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from posefabric.structures import PosefabricError


def profile(
    network: nn.Module,
    input_wh: tuple[int, int],
    *,
    batch_size: int = 1,
    repeats: int = 30,
    warmup: int = 3,
    threads: int | None = None,
) -> dict[str, Any]:
    """Parameters, multiply-adds and latency of a network, and of its head alone.

    The head is everything after the backbone: a network with ``backbone(images) -> levels`` and
    ``head_forward(levels)``; without these the ``head_*`` values are None. Arguments, result
    and errors as in :func:`compare`, for the one network.
    """
    return compare(
        {"network": network},
        input_wh,
        batch_size=batch_size,
        repeats=repeats,
        warmup=warmup,
        threads=threads,
    )["network"]


def compare(
    networks: Mapping[str, nn.Module],
    input_wh: tuple[int, int],
    *,
    batch_size: int = 1,
    repeats: int = 30,
    warmup: int = 3,
    threads: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Measure networks in one run: every round times each of them once, in changing order.

    Latencies are the median over the rounds, in milliseconds a batch, of copies in evaluation
    mode, without gradients, in channels_last, on the device of each network's parameters; what
    was passed in is left as it is. Ratios between networks of one call are fair, absolute
    values belong to the machine and its load.

    Args:
        networks: name to network.
        input_wh: width and height of the input, pixels.
        batch_size: pictures a forward pass of the latency (MACs are always of one picture).
        repeats, warmup: timed and untimed rounds.
        threads: CPU threads for the run; none: as they are.

    Returns:
        By name: ``params`` (unique parameters), ``macs`` (FLOPs / 2 as
        torch.utils.flop_counter counts, batch 1), ``latency_ms`` with ``latency_ms_low`` and
        ``latency_ms_high`` (first and last decile), ``latency_ratio`` (median of the round by
        round ratio to the first network), the same for ``head_*`` (None without a backbone to
        leave out), and the conditions: input_wh, batch_size, repeats, threads, device, torch.

    Raises:
        PosefabricError: no network, or an option that is not positive.
    """
    if not networks:
        raise PosefabricError("networks: expected at least one network to measure, got none")
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("repeats", repeats, 1),
        ("warmup", warmup, 0),
        ("threads", threads if threads is not None else 1, 1),
    ):
        if value < least:
            raise PosefabricError(f"{name}: expected at least {least}, got {value}")
    with torch_threads(threads), torch.no_grad():
        subjects = {name: _Subject(network, input_wh) for name, network in networks.items()}
        macs = {name: subject.macs() for name, subject in subjects.items()}
        times = interleaved(
            {name: subject.runs(batch_size) for name, subject in subjects.items()},
            repeats=repeats,
            warmup=warmup,
        )
        count = torch.get_num_threads()
    first = next(iter(subjects))
    results: dict[str, dict[str, Any]] = {}
    for name, subject in subjects.items():
        result: dict[str, Any] = {"params": subject.params, "macs": macs[name][0]}
        result.update(latency_summary("latency", times[name]["whole"], times[first]["whole"]))
        result.update(head_params=subject.head_params, head_macs=macs[name][1])
        result.update(
            latency_summary("head_latency", times[name].get("head"), times[first].get("head"))
        )
        result.update(
            input_wh=[int(side) for side in input_wh],
            batch_size=batch_size,
            repeats=repeats,
            threads=count,
            device=str(subject.device),
            torch=torch.__version__,
        )
        results[name] = result
    return results


def count_parameters(modules: nn.Module | Iterable[nn.Parameter]) -> int:
    """Values in the parameters of a module; a tensor used twice counts once."""
    parameters = modules.parameters() if isinstance(modules, nn.Module) else modules
    return sum({id(p): p.numel() for p in parameters}.values())


def count_macs(run: Callable[[], Any]) -> int:
    """Multiply-adds of what ``run`` computes: half the FLOPs torch counts."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2


class _Subject:
    """A copy of a network, ready to be measured."""

    def __init__(self, network: nn.Module, input_wh: tuple[int, int]) -> None:
        # A copy, since a change of memory layout or mode must not reach a running training.
        self.network: Any = copy.deepcopy(network).eval()
        self.network.to(memory_format=torch.channels_last)
        sample = next(itertools.chain(network.parameters(), network.buffers()), torch.empty(0))
        self.device = sample.device
        self.dtype = sample.dtype
        self.input_wh = input_wh
        self.params = count_parameters(self.network)
        backbone = getattr(self.network, "backbone", None)
        self.has_head = isinstance(backbone, nn.Module) and callable(
            getattr(self.network, "head_forward", None)
        )
        self.head_params: int | None = None
        if self.has_head and backbone is not None:
            shared = {id(parameter) for parameter in backbone.parameters()}
            own = (p for p in self.network.parameters() if id(p) not in shared)
            self.head_params = count_parameters(own)

    def images(self, batch_size: int) -> Tensor:
        width, height = self.input_wh
        images = torch.zeros(batch_size, 3, height, width, device=self.device, dtype=self.dtype)
        return images.to(memory_format=torch.channels_last)

    def macs(self) -> tuple[int, int | None]:
        images = self.images(1)
        whole = count_macs(lambda: self.network(images))
        if not self.has_head:
            return whole, None
        levels = self.network.backbone(images)
        return whole, count_macs(lambda: self.network.head_forward(levels))

    def runs(self, batch_size: int) -> dict[str, Callable[[], float]]:
        """Functions that compute once and return the milliseconds."""
        images = self.images(batch_size)
        runs = {"whole": lambda: self._timed(self.network, images)}
        if self.has_head:
            levels = self.network.backbone(images)
            runs["head"] = lambda: self._timed(self.network.head_forward, levels)
        return runs

    def _timed(self, function: Callable[[Any], Any], argument: Any) -> float:
        self._wait()
        start = time.perf_counter()
        function(argument)
        self._wait()
        return (time.perf_counter() - start) * 1e3

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def interleaved(
    runs: Mapping[str, Mapping[str, Callable[[], float]]], *, repeats: int, warmup: int
) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of every run in ``warmup + repeats`` rounds, each round in another order.

    ``runs``: by two names, functions that compute once and return the milliseconds. The first
    ``warmup`` rounds are not in the result.
    """
    order = [(name, kind) for name, kinds in runs.items() for kind in kinds]
    times: dict[str, dict[str, list[float]]] = {
        name: {kind: [] for kind in kinds} for name, kinds in runs.items()
    }
    for turn in range(warmup + repeats):
        # A rotating start, so that nobody always runs after the same neighbour's cache.
        shift = turn % len(order)
        for name, kind in order[shift:] + order[:shift]:
            milliseconds = runs[name][kind]()
            if turn >= warmup:
                times[name][kind].append(milliseconds)
    return times


def latency_summary(
    label: str, times: Sequence[float] | None, reference: Sequence[float] | None
) -> dict[str, float | None]:
    """Median, first and last decile, and the median ratio to a reference, under ``label_ms`` etc.

    None for each where there are no times.
    """
    names = (f"{label}_ms", f"{label}_ms_low", f"{label}_ms_high", f"{label}_ratio")
    if times is None:
        return dict.fromkeys(names)
    ordered = sorted(times)
    rank = len(ordered) // 10
    ratio = None
    if reference is not None:
        ratio = statistics.median(a / b for a, b in zip(times, reference, strict=True))
    values = (statistics.median(ordered), ordered[rank], ordered[-1 - rank], ratio)
    return dict(zip(names, values, strict=True))


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        yield
    finally:
        torch.set_num_threads(before)
