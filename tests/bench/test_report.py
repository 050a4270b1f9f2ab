"""Rows, tables and JSON of the bench."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from posefabric.bench.report import (
    bench_record,
    figure,
    machine_line,
    missing_lines,
    percent,
    profile_table,
    roofline_line,
    rows_table,
)
from posefabric.bench.rows import Missing, Row, speed_row
from posefabric.bench.timing import Ratio
from posefabric.run.files import json_bytes

PEAKS = {
    "conv_3x3": {"gflops": 81.0, "shape": [8, 64, 64, 48], "layout": "channels_last"},
    "depthwise_3x3": {"gflops": 9.0, "shape": [8, 128, 32, 24], "layout": "NCHW"},
    "copy": {"gbytes": 12.0},
}
MACHINE = {
    "cpu": "a CPU",
    "cores": 2,
    "threads": 2,
    "cpu_capability": "AVX2",
    "memory_bytes": 2**33,
    "packages": {"torch": "2.13.0"},
    "device": "cpu",
    "load": 0.5,
}


def text_of(renderable: object) -> str:
    console = Console(width=250, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(renderable)
    return console.export_text()


def row(**changes) -> Row:
    settings = {
        "name": "memory.x",
        "ratio": Ratio(0.5, 0.4, 0.6),
        "baseline": "the plain one",
        "unit": "of the baseline's peak memory",
        "better": "less",
    }
    return Row(**{**settings, **changes})


def test_a_speed_is_the_baselines_seconds_over_ours() -> None:
    found = speed_row("search_step.x", ours=[1.0, 2.0], theirs=[3.0, 6.0], count=4, baseline="it")
    assert found.ratio.median == 3.0 and found.better == "more"
    assert found.ours == pytest.approx(375.0) and found.theirs == pytest.approx(1125.0)
    assert found.measure == "ms an image" and found.conditions == {"rounds": 2}
    assert found.unit == "times the baseline's images/s"
    assert speed_row(
        "evaluation.oks", ours=[1.0], theirs=[1.0], count=1, baseline="", per="person"
    ).measure == "ms a person"  # fmt: skip


def test_json_has_what_was_asked_for_and_what_is_missing_beside_it() -> None:
    lines = [row(), Missing("memory.x.gpu", "no GPU")]
    record = bench_record(MACHINE, lines, roofline=PEAKS, profiles={}, quick=True, seconds=1.26)
    tree = json.loads(json_bytes(record))
    (first,) = tree["rows"]
    assert {"name", "ratio", "low", "high", "baseline", "unit"} <= set(first)
    assert (first["low"], first["ratio"], first["high"]) == (0.4, 0.5, 0.6)
    assert tree["not_measured"] == [{"name": "memory.x.gpu", "reason": "no GPU"}]
    assert tree["machine"] == MACHINE and tree["roofline"] == PEAKS
    assert tree["quick"] is True and tree["seconds"] == 1.3


def test_the_table_says_ratios_directions_and_reasons() -> None:
    lines = [row(ours=1.0, theirs=2.0), Missing("loader.x", "no time"), Missing("b.y", "no time")]
    text = text_of(rows_table(lines))
    assert "memory.x" in text and "0.50" in text and "0.40 - 0.60" in text
    assert "(less is better)" in text and "1.00 against 2.00" in text and "loader" not in text
    assert missing_lines(lines) == ["not measured, no time: loader.x, b.y"]
    assert "(less" not in text_of(rows_table([row(better="more")]))


def test_the_profile_is_said_in_percent() -> None:
    stage = {
        "ms": 12.34, "share": 0.25, "gflops": 40.0, "of_conv_3x3": 0.5, "of_attainable": 0.75,
    }  # fmt: skip
    bare = dict.fromkeys(stage)
    profile = {
        "batch": 8,
        "precision": "fp32",
        "stages": {"backward": stage, "read": {**bare, "ms": 1.0}},
    }
    text = text_of(profile_table("net", profile))
    for said in ("net, batch 8, fp32", "backward", "12.3", "25 %", "40.0", "50 %", "75 %", "read"):
        assert said in text


def test_machine_and_peaks_are_sentences() -> None:
    said = machine_line(MACHINE)
    assert said == "a CPU, 2 cores, 2 threads, AVX2, 8 GiB, torch 2.13.0, no GPU, load 0.5"
    assert "GPU H100" in machine_line({**MACHINE, "device": "H100", "load": None})
    assert "3x3 81.0 GFLOP/s (8x64x64x48, channels_last)" in roofline_line(PEAKS)


@pytest.mark.parametrize(
    ("value", "said"), [(0.0123, "0.012"), (1.234, "1.23"), (12.34, "12.3"), (1234.5, "1234")]
)
def test_figures(value, said) -> None:
    assert figure(value) == said
    assert percent(None) == "-" and percent(0.051) == "5 %"
