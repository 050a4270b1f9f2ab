"""Rows of the shipped network through its runtimes: against its mixture, and against peers."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator

from posefabric.bench.context import Bench
from posefabric.bench.fresh import Fresh
from posefabric.bench.inference import RUNTIMES
from posefabric.bench.rows import Line, Missing, speed_row
from posefabric.bench.shipping import exported, shipped_rounds
from posefabric.bench.subjects import PEERS, SHIPPED, Subject

BATCHES = (1, 8)
OURS = "ours"
# An export with its check; of HRNet it takes most of a minute.
QUICK_PEERS = ("mobilenet_v2_deconv",)


def shipped(bench: Bench, *, subject: Subject = SHIPPED) -> Iterator[Line]:
    """The compact network, eager and in each runtime, against the eager mixture."""
    usable: list[str] = []
    for runtime in RUNTIMES:
        name = f"shipped.{runtime}.{subject.name}"
        absent = unusable(name, runtime) or bench.too_late(name)
        if absent is None:
            usable.append(runtime)
        else:
            yield absent
    if not usable:
        return
    for batch, took in _measured(bench, subject, usable, peers=()):
        for arm, runtime in (("compact", "eager"), *((f"{OURS}@{r}", r) for r in usable)):
            yield speed_row(
                f"shipped.{runtime}.{subject.name}.batch{batch}",
                ours=took[arm],
                theirs=took["mixture"],
                count=batch,
                baseline="its own mixture, eager, channels_last",
                conditions={"batch": batch, "device": "cpu"},
            )


def peers_in_runtimes(bench: Bench, *, subject: Subject = SHIPPED) -> Iterator[Line]:
    """The compact network against other networks in the same runtime, at the same input size."""
    usable: list[str] = []
    chosen = QUICK_PEERS if bench.quick else tuple(PEERS)
    for runtime in RUNTIMES:
        for peer in PEERS:
            name = f"peers.{runtime}.{subject.name}.{peer}"
            absent = unusable(name, runtime) or bench.too_late(name)
            if absent is None and peer not in chosen:
                absent = Missing(name, "--quick leaves out its export, which takes long")
            if absent is not None:
                yield absent
            elif runtime not in usable:
                usable.append(runtime)
    if not usable:
        return
    for batch, took in _measured(bench, subject, usable, peers=chosen):
        for runtime in usable:
            for peer in chosen:
                yield speed_row(
                    f"peers.{runtime}.{subject.name}.{peer}.batch{batch}",
                    ours=took[f"{OURS}@{runtime}"],
                    theirs=took[f"{peer}@{runtime}"],
                    count=batch,
                    baseline=f"{peer}, {runtime}, same input",
                    conditions={"batch": batch, "device": "cpu"},
                )


def unusable(name: str, runtime: str) -> Missing | None:
    """A row that wants a runtime, or the exporter, that is not installed."""
    for package in (runtime, "onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            return Missing(name, f"{package} is not installed")
    return None


def _measured(
    bench: Bench, subject: Subject, runtimes: list[str], *, peers: tuple[str, ...]
) -> Iterator[tuple[int, dict[str, list[float]]]]:
    """(batch, what :func:`shipped_rounds` answers) for each size, after what it wants is exported.

    Exports are made side by side; nothing is timed meanwhile.
    """
    config = subject.config()
    configs = {OURS: config, **{peer: subject.peer(peer) for peer in peers}}
    files = {name: bench.folder / f"{subject.name}-{name}.onnx" for name in configs}
    with contextlib.ExitStack() as stack:
        exports = [
            stack.enter_context(Fresh(exported, config=configs[name], path=path))
            for name, path in files.items()
            if not path.is_file()
        ]
        for process in exports:
            process.ask()
    with Fresh(
        shipped_rounds,
        config=config,
        files=files,
        runtimes=tuple(runtimes),
        batches=BATCHES,
        plan=bench.within(bench.effort.forwards),
    ) as process:
        for batch in BATCHES:
            yield batch, process.ask()
