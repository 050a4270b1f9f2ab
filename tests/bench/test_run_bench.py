"""The whole bench and its command."""

from __future__ import annotations

import json

import pytest
from bench_parts import LITTLE, TINY
from networks import command

from posefabric.bench import run_bench as module
from posefabric.bench.rows import Missing, Row
from posefabric.bench.run_bench import GROUPS, PROFILE, Found, in_order, run_bench
from posefabric.bench.timing import Ratio
from posefabric.structures import PosefabricError

ROW = Row(name="a.row", ratio=Ratio(2.0, 1.0, 3.0), baseline="it", unit="times")


def part(*lines, error: str | None = None):
    def measure(bench):
        yield from lines
        if error is not None:
            raise PosefabricError(error)

    return measure


def test_the_groups_are_those_asked_for() -> None:
    assert set(GROUPS) == {
        "search_step",
        "inference",
        "memory",
        "loader",
        "evaluation",
        "shipped",
        "peers",
        "compile",
        "processes",
    }


def test_groups_run_in_order_and_what_fails_is_a_row(monkeypatch) -> None:
    monkeypatch.setattr(module, "measure_profile", lambda bench, found: None)
    said: list[str] = []
    groups = {"a": (part(ROW, error="no memory"), part(ROW)), "b": (part(),)}
    found = run_bench(groups=groups, say=said.append, quick=True)
    assert [line.split(",")[0] for line in said] == [
        "measuring a",
        "measuring b",
        "measuring profile",
    ]
    assert all(line.endswith(" s left") for line in said)
    assert in_order(GROUPS)[-3:] == [PROFILE, "peers", "compile"]
    assert found.lines == [ROW, Missing("a.measure", "failed: no memory"), ROW]
    assert run_bench(groups=groups, only=["b"]).lines == []
    assert found.machine["cores"] >= 1 and found.seconds >= 0


def test_a_group_that_there_is_not() -> None:
    with pytest.raises(PosefabricError, match="--only loading: no such group; there are search_"):
        run_bench(only=["loading"])


def test_the_profile_says_what_failed(tmp_path, monkeypatch) -> None:
    from bench_parts import make_bench

    def once(target, **options):
        if target.__name__ == "stage_rounds":
            raise PosefabricError("no memory")
        return {"copy": {}}

    monkeypatch.setattr(module, "once", once)
    found = Found(machine={}, quick=True)
    module.measure_profile(make_bench(tmp_path), found)
    assert found.roofline == {"copy": {}}
    assert found.profiles == {"tiny": {"not_measured": "no memory"}}
    assert found.record()["profile"] == found.profiles


def test_the_command_prints_and_writes(monkeypatch, tmp_path, capsys) -> None:
    asked: list[dict] = []

    def run(**options):
        asked.append(options)
        options["say"]("measuring a")
        return Found(
            machine={"cpu": "x"},
            quick=True,
            lines=[ROW, Missing("a.other", "no GPU")],
            profiles={"net": {"not_measured": "no time"}},
        )

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(module, "run_bench", run)
    path = tmp_path / "new" / "bench.json"
    words = ("--quick", "--json", path, "--only", "loader", "memory")
    assert command(monkeypatch, "bench", *words) == 0
    assert asked[0]["quick"] is True and tuple(asked[0]["only"]) == ("loader", "memory")
    tree = json.loads(path.read_text())
    assert tree["machine"] == {"cpu": "x"} and tree["rows"][0]["name"] == "a.row"
    said = capsys.readouterr().out
    for text in (
        "cores",
        "a.row",
        "not measured, no GPU: a.other",
        "profile of net: not measured: no time",
    ):
        assert text in said


def test_the_command_refuses_an_unknown_group(monkeypatch, capsys) -> None:
    assert command(monkeypatch, "bench", "--only", "speed") == 1
    assert "--only speed: no such group" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_of_it_on_a_tiny_network(monkeypatch) -> None:
    monkeypatch.setattr("posefabric.bench.group_loader.SIZES", (64,))
    for name in ("shipped", "peers_in_runtimes"):
        measure = getattr(module.group_shipped, name)
        monkeypatch.setattr(
            module.group_shipped, name, lambda bench, f=measure: f(bench, subject=TINY)
        )
    groups = {
        **GROUPS,
        "shipped": (module.group_shipped.shipped,),
        "peers": (module.group_shipped.peers_in_runtimes,),
    }
    found = run_bench(quick=True, subjects=[TINY], effort=LITTLE, groups=groups)
    failed = [line for line in found.lines if isinstance(line, Missing) and "failed" in line.reason]
    assert not failed
    rows = {line.name: line for line in found.lines if isinstance(line, Row)}
    for group in ("search_step", "inference", "memory", "loader", "evaluation", "shipped"):
        assert [name for name in rows if name.startswith(f"{group}.")], group
    assert all(row.ratio.low <= row.ratio.median <= row.ratio.high for row in rows.values())
    assert all(0 < rows[f"loader.wait_64px_workers{n}"].ratio.median < 1 for n in range(3))
    stages = found.profiles["tiny"]["stages"]
    assert sum(stage["share"] or 0 for stage in stages.values()) == pytest.approx(1)
    assert PROFILE not in GROUPS and found.roofline is not None
