"""The report is one file that says what it was given, and nothing that it was not."""

import base64
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest

from posefabric.deploy.charts import Series, line_chart, nice_ticks, tick_label
from posefabric.deploy.report import Cell, Section, Tile, render_report, write_report
from posefabric.deploy.report_sections import (
    curves_section,
    fabrics_section,
    headline_section,
    joints_section,
    parts_section,
    report_sections_from,
    shipped_section,
)
from posefabric.space.architecture import (
    Architecture,
    Backbone,
    Choice,
    Edge,
    Part,
    Source,
)
from posefabric.space.architecture import (
    Cell as FabricCell,
)
from posefabric.structures import PosefabricError

EVIL = "<script>alert('x')</script>&\"quoted\""


class Page(HTMLParser):
    """Tags in order, open tags left over, texts, and everything a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.said: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "img", "line", "circle", "polyline"):
            self.open.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.said.append(data)
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data


def architecture() -> Architecture:
    edge = Edge(start=0, end=1, choices=(Choice(operation="skip", weight=1.0),))
    origin = Source(kind="same", scale=0, weight=1.0, slot=0)
    cell = FabricCell(layer=3, scale=0, width=8, sources=(origin,), edges=(edge,))
    return Architecture(
        skeleton="made",
        keypoint_names=("nose", "tail", "paw"),
        input_wh=(64, 64),
        backbone=Backbone(name="tiny", channels=(8,)),
        first_layer=3,
        parts=(
            Part(name="head", keypoints=(0,), cells=(cell,)),
            Part(name="rest", keypoints=(1, 2), cells=(cell,)),
        ),
    )


def network(shares: tuple[float, float, float | None], **profile: float) -> dict:
    counts = (10, 30, 10)
    names = ("nose", "tail", "paw")
    joints = {
        name: {"value": share, "count": count}
        for name, share, count in zip(names, shares, counts, strict=True)
    }
    pck = {"PCK": shares[0], "threshold": 0.2, "normaliser": "torso", "persons": 4, "left_out": 1}
    return {
        "evaluation": {"pck": {**pck, "joints": 50, "per_joint": joints}, "oks": {"AP": -1.0}},
        "profile": profile,
        "architecture": architecture(),
    }


def networks() -> dict[str, dict]:
    return {
        "mixture": network((0.80, 0.5, 0.4), params=3.5e6, macs=4e8, latency_ms=20.0),
        "compact": network((0.78, 0.6, None), params=3.0e6, macs=1e8, latency_ms=8.0),
    }


def records(count: int, phase: str = "search") -> list[dict]:
    rows: list[dict] = []
    for step in range(1, count + 1):
        row = {"step": step, "phase": phase, "loss": 8.0 / step, "learning_rate": 1e-3}
        if step % 10 == 0:
            row.update(alpha_entropy=1.3, beta_entropy=1.0, images_per_s=50.0)
        if step % 25 == 0:
            row["val_PCK"] = step / count
        rows.append(row)
    rows.append({"step": count + 1, "phase": phase, "loss": float("nan"), "skipped": True})
    return rows


def rows_of(section: Section) -> dict[str, list[str]]:
    return {row[0]: row[1:] for row in Page(section.html()).rows}


def full_page() -> str:
    sections = report_sections_from(
        facts={"skeleton": EVIL, "parts": ["head", "rest"], "budget": None},
        networks=networks(),
        records={"search": records(60), EVIL: records(40, "finetune")},
        pictures={EVIL: np.full((30, 40, 3), (200, 10, 10), dtype=np.uint8)},
        onnx={"largest difference": 4e-6, EVIL: True},
        commands=[f"posefabric search {EVIL}"],
        environment={"packages": {"torch": "2.6"}, "git": EVIL},
    )
    return render_report(title=EVIL, sections=sections, lead=EVIL)


def test_a_full_report_is_well_formed_escaped_and_self_contained():
    text = full_page()
    page = Page(text)
    assert page.open == []
    assert "script" not in page.tags and "link" not in page.tags
    for link in page.links:
        assert link.startswith(("#", "data:image/"))
    assert not re.search(r"url\(|@import|<iframe", text)
    outside = re.sub(r"data:image/[a-z+]+;base64,[A-Za-z0-9+/=]*", "", text)
    assert "http" not in outside
    assert "".join(page.said).count(EVIL) >= 7
    assert "prefers-color-scheme:dark" in text and "width=device-width" in text
    anchors = {link[1:] for link in page.links if link.startswith("#")}
    assert anchors == set(re.findall(r'<section id="([^"]+)"', text)) and len(anchors) == 11


def test_only_what_is_known_becomes_a_section():
    sections = report_sections_from(facts={"a": 1}, networks={})
    assert [section.title for section in sections] == ["Result", "What was searched"]
    assert "No network was evaluated" in sections[0].html()


def test_the_headline_compares_quality_in_points_and_cost_in_ratios():
    rows = rows_of(headline_section(networks()))
    assert rows[""] == ["mixture", "compact", "compact against mixture"]
    assert rows["PCK@0.2"] == ["80.0", "78.0", "-2.0 points"]
    assert rows["parameters"] == ["3.5 M", "3 M", "0.86×"]
    assert rows["MACs"] == ["400 M", "100 M", "0.25×"]
    assert rows["latency"] == ["20 ms", "8 ms", "0.40×"]
    assert "AP" not in rows, "-1 means that the ground truth has nothing of the kind"
    text = headline_section(networks()).html()
    assert "torso over 50 joints of 4 persons (1 persons left out)" in text


def test_the_headline_marks_better_and_worse():
    text = headline_section(networks()).html()
    assert re.search(r'class="bad"><span>-2.0 points', text)
    assert re.search(r'class="good"><span>0.25×', text)


def test_one_network_alone_has_no_ratio():
    rows = rows_of(headline_section({"compact": networks()["compact"]}))
    assert rows[""] == ["compact"] and rows["PCK@0.2"] == ["78.0"]


def test_keypoints_and_parts_have_their_shares_and_counts():
    rows = rows_of(joints_section(networks()))
    assert rows["keypoint"] == ["mixture", "compact", "change", "joints"]
    assert rows["tail"] == ["50.0", "60.0", "+10.0 points", "30"]
    assert rows["paw"] == ["40.0", "–", "–", "10"]
    parts = rows_of(parts_section(networks()))
    # 30 x 0.5 + 10 x 0.4 of 40 joints; the compact network has no paws annotated.
    assert parts["rest"][:2] == ["47.5", "60.0"]
    assert parts["head"][:2] == ["80.0", "78.0"]


def test_evaluated_parts_win_over_the_mean_of_joints():
    given = networks()
    given["mixture"]["evaluation"]["pck"]["per_part"] = {"rest": {"value": 0.123, "count": 9}}
    assert rows_of(parts_section(given))["rest"][0] == "12.3"


def test_curves_have_a_line_a_run_and_phase():
    both = records(60) + records(30, "finetune")
    text = curves_section({"a run": both, "other": records(50)}).html()
    titles = re.findall(r"<figcaption>([^<]*)</figcaption>", text)
    assert titles == [
        "loss",
        "learning rate",
        "entropy of alpha (operations)",
        "entropy of beta (sources)",
        "pictures a second",
        "validation PCK",
    ]
    loss = text.split("</figure>")[0]
    assert re.findall(r"</i>([^<]*)</span>", loss) == ["a run, search", "a run, finetune", "other"]
    assert loss.count("<polyline") == 3 and "nan" not in loss
    assert curves_section({}).blocks == []


def test_chart_points_are_where_the_axes_say():
    text = line_chart([Series("s", [0, 10], [0.0, 4.0])], title="t")
    points = re.search(r'points="([^"]*)"', text)
    assert points is not None
    (x0, y0), (x1, y1) = (map(float, pair.split(",")) for pair in points.group(1).split())
    x0, y0, x1, y1 = float(x0), float(y0), float(x1), float(y1)
    labels = dict(
        (label, float(y))
        for y, label in re.findall(r'y="([\d.]+)" text-anchor="end">([^<]*)<', text)
    )
    assert labels["0"] - 4 == pytest.approx(y0) and labels["4"] - 4 == pytest.approx(y1)
    across = dict(
        (label, float(x))
        for x, label in re.findall(r'x="([\d.]+)" y="[\d.]+" text-anchor="middle">(\d+)<', text)
    )
    assert across["0"] == pytest.approx(x0) and across["10"] == pytest.approx(x1)


def test_charts_average_long_lines_and_skip_what_cannot_be_drawn():
    steps = np.arange(10_000)
    long = line_chart([Series("s", steps.tolist(), (steps % 2).tolist())], title="t")
    points = re.search(r'points="([^"]*)"', long)
    assert points is not None and len(points.group(1).split()) == 400
    assert line_chart([Series("s", [1, 2], [float("nan"), float("inf")])], title="t") == ""
    assert line_chart([Series("s", [1, 2], [0.0, -1.0])], title="t", log_y=True) == ""
    assert "<circle" in line_chart([Series("s", [3], [1.0])], title="t")
    with pytest.raises(PosefabricError, match="2 x values but 1"):
        line_chart([Series("s", [1, 2], [1.0])], title="t")


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 1, [0, 0.5, 1]), (0, 8, [0, 2, 4, 6, 8]), (0.32, 0.71, [0.3, 0.4, 0.5, 0.6, 0.7, 0.8])],
)
def test_ticks_are_round_and_cover_the_range(low: float, high: float, ticks: list[float]):
    assert nice_ticks(low, high, 5) == pytest.approx(ticks)
    constant = nice_ticks(5.0, 5.0, 5)
    assert constant[0] < 5 < constant[-1]


def test_tick_labels_are_short():
    labels = [tick_label(value) for value in (0, 0.25, 1500, 20_000, 2.5e6, 0.0005, 1e-5)]
    assert labels == ["0", "0.25", "1500", "20k", "2.5M", "5e-4", "1e-5"]


def test_architectures_are_drawn_or_at_least_told(monkeypatch: pytest.MonkeyPatch):
    text = fabrics_section(networks()).html()
    assert text.count("data:image/svg+xml;base64,") == 2 and text.count("<details>") == 2
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    text = fabrics_section(networks()).html()
    assert "data:image" not in text and "posefabric[viz]" in text and "head (1 cell)" in text


def test_pictures_and_tables_and_tiles_keep_their_content():
    image = np.zeros((24, 32, 3), dtype=np.uint8)
    image[:, :16] = (250, 20, 30)
    section = Section("s").add_image(image, quality=95).add_tiles([Tile("a", "1", "<b>")])
    section.add_table(["x", "y"], [["p", Cell("q", bar=2.0)], [None, 0.123456]])
    text = section.html()
    encoded = re.search(r"data:image/jpeg;base64,([^\"]*)", text)
    assert encoded is not None
    data = np.frombuffer(base64.b64decode(encoded.group(1)), dtype=np.uint8)
    back = cv2.imdecode(data, cv2.IMREAD_COLOR)[:, :, ::-1]
    assert np.abs(back[12, 4].astype(int) - (250, 20, 30)).max() < 12
    assert "width:100.0%" in text and "&lt;b&gt;" in text
    assert Page(text).rows[-1] == ["–", "0.1235"]


def test_wrong_content_is_refused():
    with pytest.raises(PosefabricError, match="row 1 has 1 cells, the header 2"):
        Section("s").add_table(["a", "b"], [[1, 2], [1]])
    with pytest.raises(PosefabricError, match="SVG, PNG or JPEG"):
        Section("s").add_figure(b"GIF89a")


def test_writing_makes_the_folder_and_replaces_the_file(tmp_path: Path):
    path = tmp_path / "new" / "report.html"
    for number in range(2):
        sections = [Section("s").add_text(f"first {number}\n\nsecond")]
        assert write_report(path, title="t", sections=sections) == path
    text = path.read_text(encoding="utf-8")
    assert "<p>first 1</p><p>second</p>" in text and "first 0" not in text
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]


def test_what_was_shipped_is_a_row_a_file() -> None:
    latency = {"1": {"ms": 2.5, "low": 2.0, "high": 3.25, "ratio": 4.0}}
    rows = [
        {"variant": "torch eager", "file": None, "bytes": None, "latency": latency},
        {"variant": EVIL, "bytes": 12_340_000, "PCK": 51.234, "loss": None, "latency": latency},
        {
            "variant": "onnxruntime int8",
            "bytes": 4_000_000,
            "PCK": 50.0,
            "loss": {"PCK": 1.234},
            "latency": latency,
            "written": False,
        },
    ]
    conditions = {
        "threads": 2,
        "latency_rounds": 20,
        "persons": 7,
        "data": "people",
        "flip": False,
        "losses_against": "onnxruntime fp32",
    }
    table = {"rows": rows, "conditions": conditions, "machine": {"cpu": "a CPU"}}
    page = Page(shipped_section(table).html())
    headers, eager, whole, small = page.rows
    assert headers[:4] == ["variant", "MB", "PCK, %", "loss, points"]
    assert headers[4:] == ["ms, batch 1", "times torch, batch 1"]
    assert eager == ["torch eager", "–", "–", "–", "2.50 (2.00 to 3.25)", "4.00"]
    assert whole[:4] == [EVIL, "12.34", "51.23", "–"]
    assert small[0] == "onnxruntime int8 (lost too much, not written)" and small[3] == "+1.23"
    said = " ".join(page.said)
    assert "a CPU, 2 threads" in said and "7 persons of people, flip test off" in said
    sections = report_sections_from(facts={}, networks={}, shipped=table)
    assert "Shipped" in [section.title for section in sections]
