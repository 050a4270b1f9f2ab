"""The headline of a report: quality and cost of the networks, and the last against the first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, NamedTuple

from posefabric.deploy.report import Cell, Section, Tile

Network = Mapping[str, Any]
Networks = Mapping[str, Network]

NONE = "–"
_COSTS = {
    "params": "parameters",
    "macs": "MACs",
    "head_params": "head parameters",
    "head_macs": "head MACs",
    "latency_ms": "latency",
    "head_latency_ms": "head latency",
}
_OKS_SHOWN = ("AP", "AP50", "AP75", "AR")


def headline_section(networks: Networks) -> Section:
    """Quality and cost of every network, the last compared with the first."""
    section = Section("Result")
    names = list(networks)
    if not names:
        return section.add_text("No network was evaluated.")
    compared = len(names) > 1
    headers = ["", *names] + ([f"{names[-1]} against {names[0]}"] if compared else [])
    rows: list[list[Cell | str]] = []
    tiles: list[Tile] = []
    for label, values, show, is_cost, is_tile in _measures(networks):
        row: list[Cell | str] = [label, *(show(value) for value in values)]
        first, last = values[0], values[-1]
        change = change_cell(first, last, is_cost) if compared else None
        if compared:
            row.append(change or Cell(NONE))
        rows.append(row)
        if last is not None and is_tile:
            note = ""
            if change is not None:
                note = f"{change.text} {'of' if is_cost else 'against'} {names[0]}"
            tiles.append(Tile(f"{label}, {names[-1]}", show(last), note))
    if tiles:
        section.add_tiles(tiles)
    if rows:
        section.add_table(headers, rows, caption=_conditions(networks))
    return section


class _Measure(NamedTuple):
    """One row: a value a network, how it is written, whether less is better, whether a tile."""

    label: str
    values: list[float | None]
    show: Callable[[float | None], str]
    is_cost: bool
    is_tile: bool


def _measures(networks: Networks) -> list[_Measure]:
    every: list[_Measure] = []

    def add(
        label: str,
        values: list[Any],
        show: Callable[[float | None], str],
        *,
        is_cost: bool = False,
        is_tile: bool = False,
    ) -> None:
        numbers = [float(value) if is_number(value) else None for value in values]
        if any(number is not None for number in numbers):
            every.append(_Measure(label, numbers, show, is_cost, is_tile))

    pcks = [pck_of(network) for network in networks.values()]
    threshold = next((pck["threshold"] for pck in pcks if "threshold" in pck), None)
    label = "PCK" if threshold is None else f"PCK@{threshold:g}"
    add(label, [pck.get("PCK") for pck in pcks], percent, is_tile=True)
    add("limbs " + label, [pck.get("limbs") for pck in pcks], percent)
    heads = [_evaluated(network, "pckh") for network in networks.values()]
    share = next((head["threshold"] for head in heads if "threshold" in head), 0.5)
    for key, label in (("Mean", f"PCKh@{share:g}"), ("Mean@0.1", "PCKh@0.1")):
        shares = [None if head.get(key) is None else head[key] / 100 for head in heads]
        add(label, shares, percent, is_tile=key == "Mean")
    results = [_evaluated(network, "oks") for network in networks.values()]
    for key in _OKS_SHOWN:
        # pycocotools says -1 where the ground truth has nothing of the kind.
        known = [None if (oks.get(key) or 0) < 0 else oks.get(key) for oks in results]
        add(key, known, percent, is_tile=key == "AP")
    for key, label in _COSTS.items():
        costs = [(network.get("profile") or {}).get(key) for network in networks.values()]
        show = _milliseconds if "latency" in key else _amount
        add(label, costs, show, is_cost=True, is_tile=not key.startswith("head"))
    return every


def change_cell(first: float | None, last: float | None, is_cost: bool) -> Cell | None:
    """Shares in points, costs as a ratio, marked good or bad; None where one is missing."""
    if first is None or last is None:
        return None
    if is_cost:
        if not first:
            return None
        ratio = last / first
        tone = "good" if ratio < 0.995 else "bad" if ratio > 1.005 else None
        return Cell(f"{ratio:.2f}×", tone=tone)
    points = 100 * (last - first)
    tone = "good" if points > 0.05 else "bad" if points < -0.05 else None
    return Cell(f"{points:+.1f} points", tone=tone)


def _conditions(networks: Networks) -> str:
    """Under which conditions the numbers hold, as far as the results say."""
    said = []
    for network in networks.values():
        pck, oks = pck_of(network), _evaluated(network, "oks")
        profile = network.get("profile") or {}
        if "normaliser" in pck:
            said.append(
                f"PCK in units of the {pck['normaliser']} over {pck.get('joints')} joints of "
                f"{pck.get('persons')} persons ({pck.get('left_out', 0)} persons left out)"
            )
        if "box_source" in oks:
            said.append(f"boxes: {oks['box_source']}")
        if "sigmas_source" in oks:
            said.append(f"OKS sigmas: {oks['sigmas_source']}")
        if "batch_size" in profile:
            said.append(
                f"latency: median of {profile.get('repeats')}, batch {profile['batch_size']}, "
                f"{profile.get('threads')} threads, {profile.get('device')}"
            )
    return "; ".join(dict.fromkeys(said))


def _evaluated(network: Network, kind: str) -> Mapping[str, Any]:
    return (network.get("evaluation") or {}).get(kind) or {}


def pck_of(network: Network) -> Mapping[str, Any]:
    """A network's PCK results, empty where it was not evaluated so."""
    return _evaluated(network, "pck")


def is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def percent(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.1f}"


def _milliseconds(value: float | None) -> str:
    return NONE if value is None else f"{value:.3g} ms"


def _amount(value: float | None) -> str:
    if value is None:
        return NONE
    for power, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= power:
            return f"{value / power:.3g} {unit}"
    return f"{value:.0f}"
