"""Milliseconds of a graph's pieces: a table measured on one device, in one runtime."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from posefabric.structures import PosefabricError

Size = tuple[int, int]
VERSION = 1
TABLE_NAME = "latency.json"  # in a search run


@dataclass(frozen=True, order=True)
class Piece:
    """Something that a graph has once or often, and that takes its time.

    Attributes:
        kind, name: operation (a candidate), source (how a cell is reached), pointwise (a 1x1
            convolution, its batch norm folded), or backbone (by its name).
        width_in, width_out: channels; of a backbone 3 and how many levels are read.
        size: (h, w) of what goes in.
    """

    kind: Literal["operation", "source", "pointwise", "backbone"]
    name: str
    width_in: int
    width_out: int
    size: Size

    def __str__(self) -> str:
        height, width = self.size
        return f"{self.kind} {self.name} {self.width_in}>{self.width_out} at {width}x{height}"


class Table(Protocol):
    """What can say how long a piece takes."""

    def of(self, piece: Piece) -> float: ...


class Recorder:
    """A table in which everything takes no time, and that remembers what it was asked for."""

    def __init__(self) -> None:
        self.pieces: set[Piece] = set()

    def of(self, piece: Piece) -> float:
        self.pieces.add(piece)
        return 0.0


@dataclass(frozen=True, eq=False)
class LatencyTable:
    """What each piece takes by itself, and how such sums become whole networks' latencies.

    A network of pieces i takes about ``overhead_ms + factor * sum_i ms_i``: the two were fitted to
    whole networks, since pieces side by side share overheads and caches.

    Attributes:
        ms: milliseconds of a piece for one picture, by its text.
        runtime, threads, device, packages, input_wh: what they hold for.
        fitted: facts about the fit.
        checked: what a check against other whole networks gave; none: not checked.
    """

    ms: Mapping[str, float]
    runtime: str
    threads: int
    device: str
    packages: Mapping[str, str | None]
    input_wh: Size
    factor: float = 1.0
    overhead_ms: float = 0.0
    fitted: Mapping[str, Any] = field(default_factory=dict)
    checked: Mapping[str, Any] | None = None

    def of(self, piece: Piece) -> float:
        """A piece's share of a network's milliseconds; PosefabricError where it was not measured.

        The backbone carries the overhead.
        """
        name = str(piece)
        if name not in self.ms:
            raise PosefabricError(
                f"the latency table has no {name}; it was measured for another search space: make "
                f"one with `posefabric latency` and this run's options"
            )
        overhead = self.overhead_ms if piece.kind == "backbone" else 0.0
        return overhead + self.factor * self.ms[name]

    def to_json(self) -> str:
        return json.dumps({"version": VERSION, **asdict(self)}, indent=1)

    @classmethod
    def load(cls, path: Path) -> LatencyTable:
        """A table from its file; PosefabricError that names the file where it cannot be one."""
        try:
            tree = json.loads(path.read_text())
            if tree.pop("version") != VERSION:
                raise ValueError(f"expected version {VERSION}")
            tree["input_wh"] = tuple(tree["input_wh"])
            return cls(**tree)
        except FileNotFoundError:
            raise PosefabricError(
                f"{path}: not found; a latency budget needs a table of this device: "
                f"`posefabric latency CONFIG --out {path}` measures one"
            ) from None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise PosefabricError(
                f"{path}: not a latency table ({type(error).__name__}: {error}); "
                f"`posefabric latency CONFIG --out {path}` measures one"
            ) from error
