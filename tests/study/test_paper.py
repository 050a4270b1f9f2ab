"""The paper's configurations build, their figures are the published ones, and they run."""

from __future__ import annotations

from pathlib import Path

import pytest

from posefabric.cli import app
from posefabric.config import load_config
from posefabric.models.build import build_supernet
from posefabric.structures import PosefabricError
from posefabric.study.paper import (
    PREFIX,
    Compared,
    compare_with_paper,
    paper_configs,
    paper_rows,
    published,
    second_node_parameters,
)
from posefabric.study.paper_run import run_briefly
from posefabric.study.paper_table import paper_table, reasons

MPII = (
    "data.train_annotations=test_mpii.json",
    "data.val_annotations=test_mpii.json",
    "data.train_images=.",
    "data.val_images=.",
    "data.input_wh=[64,64]",
)


def test_every_published_row_has_a_configuration_and_every_configuration_a_row() -> None:
    assert {PREFIX + name for name in published()} == set(paper_configs())


@pytest.mark.parametrize(
    ("here", "said", "agrees"),
    [(3.31, 3.3, True), (3.36, 3.3, False), (23.675, 23.7, True), (11.3, 11.4, True),
     (10.6, 11.4, False), (1.0, None, None)],
)  # fmt: skip
def test_figures_agree_within_one_percent_or_as_printed(here, said, agrees) -> None:
    assert Compared(here, said).agrees is agrees


def test_the_table_has_the_papers_figures_and_no_difference_without_a_reason() -> None:
    rows = list(paper_rows(["paper/mpii_mobilenet_cnf3", "paper/mpii_mobilenet_cnf1"]))
    assert rows[0].params_used == pytest.approx(2.89, abs=0.01)  # PAPER section 5: ever used
    assert rows[0].params.here == pytest.approx(3.3, abs=0.05) and rows[0].params.agrees
    assert rows[0].macs.here == pytest.approx(1.2, abs=0.05)
    assert rows[1].macs.published is None and not rows[1].unexplained
    assert paper_table(rows).row_count == 2 and reasons(rows) == []


def test_a_difference_needs_a_reason() -> None:
    config = load_config("paper/mpii_mobilenet_cnf1", ["data.input_wh=[64,64]"])
    row = compare_with_paper("x", config, {"macs": 9.9, "backbone": 1.3, "unit": 1e9})
    assert row.unexplained
    assert reasons([row]) == [
        "x: backbone 1.34 / 1.3 M; G = 1e+09 here, which is what the published figure fits"
    ]
    assert not compare_with_paper("x", config, {"macs": 9.9, "why": "a smaller input"}).unexplained


def test_a_second_node_adds_one_edge_to_every_hidden_node() -> None:
    """By hand: separable twice and dilated once, 3 (9 w + w^2), over the cells' widths."""
    config = load_config("paper/mpii_mobilenet_cnf1")
    widths = [40, 80, 160, 40, 80, 40]
    assert second_node_parameters(build_supernet(config, pretrained=False)) == sum(
        3 * (9 * w + w * w) for w in widths
    )


@pytest.mark.slow
def test_no_row_of_the_table_differs_without_a_reason() -> None:
    assert [row.name for row in paper_rows() if row.unexplained] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", paper_configs())
def test_every_configuration_trains_and_evaluates(name: str, tmp_path: Path, shared: Path) -> None:
    data = shared / "data"
    small = MPII if "mpii" in name else ("data.input_wh=[64,64]",)
    line = run_briefly(
        name, tmp_path, mpii=data / "mpii_sample", coco=data / "coco_mini", overrides=small
    )
    assert line.startswith(f"{name}: 2 steps, ")


def test_one_configuration_trains_and_evaluates_from_the_command_line(
    tmp_path: Path, shared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    only = ["--only", "mobilenet_cnf1", "--mpii", str(shared / "data" / "mpii_sample")]
    app(["paper", *MPII, "--run", *only, "--out", str(tmp_path)], result_action="return_value")
    assert "2 steps, 5 persons evaluated" in capsys.readouterr().out


def test_wrong_words(tmp_path: Path) -> None:
    with pytest.raises(PosefabricError, match=r"mpii_mobilenet_cnf1: needs --mpii DIR"):
        run_briefly("paper/mpii_mobilenet_cnf1", tmp_path, mpii=None, coco=tmp_path)
    with pytest.raises(PosefabricError, match="--only nothing"):
        app(["paper", "--only", "nothing"], result_action="return_value")
