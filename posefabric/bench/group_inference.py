"""Rows of eager networks: the mixture against the yardstick, and both kinds of peers."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from posefabric.bench.context import Bench, Place
from posefabric.bench.fresh import once
from posefabric.bench.group_steps import step_rounds
from posefabric.bench.inference import forward_rounds
from posefabric.bench.released import BASELINE
from posefabric.bench.rows import Line, Missing, Row, speed_row
from posefabric.bench.subjects import PEERS, Subject
from posefabric.bench.training import own_steps


def inference(bench: Bench) -> Iterator[Line]:
    """A forward pass of the mixture with everything in it, as evaluation runs it."""
    for subject in bench.subjects:
        for place in bench.places(f"inference.{subject.name}"):
            if isinstance(place, Missing):
                yield place
                continue
            yield bench.attempt(place.name, functools.partial(_row, bench, subject, place))


def _row(bench: Bench, subject: Subject, place: Place) -> Row:
    batch, config = subject.images(quick=bench.quick), subject.config()
    found = once(
        forward_rounds,
        configs={"ours": config, "theirs": config},
        batch=batch,
        device=place.device,
        plan=bench.within(bench.effort.forwards),
    )
    return speed_row(
        place.name,
        ours=found["took"]["ours"],
        theirs=found["took"]["theirs"],
        count=batch,
        baseline=BASELINE,
        conditions={"batch": batch, "device": place.device, "precision": found["precision"]},
    )


def peers_in_eager(bench: Bench) -> Iterator[Line]:
    """The mixture's forward pass and training step against those of other networks.

    Peers have the same input, runtime, loop and layout; a row says how many times as fast the
    mixture is as the peer.
    """
    for subject in bench.subjects:
        batch = subject.images(quick=bench.quick)
        names = {peer: f"peers.inference.{subject.name}.{peer}" for peer in PEERS}
        late = [bench.too_late(name) for name in names.values()]
        if any(late):
            yield from (line for line in late if line is not None)
        else:
            found = once(
                forward_rounds,
                configs={
                    "ours": subject.config(),
                    **{peer: subject.peer(peer) for peer in PEERS},
                },
                batch=batch,
                device="cpu",
                plan=bench.within(bench.effort.forwards),
            )
            yield from _peer_rows(names, found["took"], batch, found["precision"])
    for subject in bench.subjects:
        batch = subject.images(quick=bench.quick)
        names = {peer: f"peers.search_step.{subject.name}.{peer}" for peer in PEERS}
        late = [bench.too_late(name) for name in names.values()]
        if any(late):
            yield from (line for line in late if line is not None)
            continue
        arms = {"ours": (own_steps, subject.config())}
        arms.update({peer: (own_steps, subject.peer(peer)) for peer in PEERS})
        took = step_rounds(arms, batch=batch, device="cpu", plan=bench.within(bench.effort.steps))
        yield from _peer_rows(names, took, batch, None)


def _peer_rows(
    names: dict[str, str], took: dict[str, list[float]], batch: int, precision: str | None
) -> Iterator[Line]:
    conditions = {"batch": batch, "device": "cpu"}
    if precision is not None:
        conditions["precision"] = precision
    for peer, name in names.items():
        yield speed_row(
            name,
            ours=took["ours"],
            theirs=took[peer],
            count=batch,
            baseline=f"{peer}, eager, channels_last, same input",
            conditions=conditions,
        )
