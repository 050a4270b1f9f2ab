"""One self-contained HTML file: sections of tables, figures, pictures and charts.

Nothing is fetched: styles are inline and pictures are data URIs. Everything a caller hands in is
escaped; light or dark follows the reader's system.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np

from posefabric.deploy.charts import Series, line_chart
from posefabric.deploy.report_style import STYLE
from posefabric.run import write_atomic
from posefabric.structures import PosefabricError

_MEDIA = {
    b"\x89PNG": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"<?xml": "image/svg+xml",
    b"<svg": "image/svg+xml",
}


@dataclass(frozen=True)
class Cell:
    """A table cell: text, a bar behind it (0 to 1), and whether it is good or bad news."""

    text: str
    bar: float | None = None
    tone: Literal["good", "bad"] | None = None


@dataclass(frozen=True)
class Tile:
    """A headline number."""

    label: str
    value: str
    note: str = ""


@dataclass
class Section:
    """A titled part of a report; the ``add_*`` methods return it, so they chain."""

    title: str
    blocks: list[str] = field(default_factory=list)

    def add_text(self, text: str) -> Section:
        """Plain text; an empty line starts a new paragraph."""
        for paragraph in text.strip().split("\n\n"):
            self.blocks.append(f"<p>{html.escape(paragraph)}</p>")
        return self

    def add_tiles(self, tiles: Iterable[Tile]) -> Section:
        """Headline numbers side by side."""
        cards = [
            f'<div class="tile"><span>{html.escape(tile.label)}</span>'
            f"<b>{html.escape(tile.value)}</b><small>{html.escape(tile.note)}</small></div>"
            for tile in tiles
        ]
        self.blocks.append(f'<div class="tiles">{"".join(cards)}</div>')
        return self

    def add_facts(self, facts: Mapping[str, Any]) -> Section:
        """Labels and values; lists are joined by commas, None is left out."""
        rows = [
            f"<div><dt>{html.escape(str(label))}</dt><dd>{html.escape(_say(value))}</dd></div>"
            for label, value in facts.items()
            if value is not None
        ]
        self.blocks.append(f"<dl>{''.join(rows)}</dl>")
        return self

    def add_table(
        self,
        headers: Sequence[str],
        rows: Sequence[Sequence[Cell | str | float | int | None]],
        *,
        caption: str = "",
        numeric: bool = True,
    ) -> Section:
        """A table, first column on the left, the others on the right if ``numeric``.

        Raises PosefabricError for a row of another length than the headers.
        """
        for number, row in enumerate(rows):
            if len(row) != len(headers):
                raise PosefabricError(
                    f"report, {self.title}: table row {number} has {len(row)} cells, "
                    f"the header {len(headers)}"
                )
        head = "".join(f"<th>{html.escape(header)}</th>" for header in headers)
        body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
        below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
        kind = "numbers" if numeric else "words"
        self.blocks.append(
            f'<figure class="table"><div class="wide"><table class="{kind}"><thead><tr>{head}</tr>'
            f"</thead><tbody>{body}</tbody></table></div>{below}</figure>"
        )
        return self

    def add_figure(
        self, data: bytes, *, caption: str = "", alt: str = "", least_width: int = 0
    ) -> Section:
        """A drawing: bytes of an SVG, PNG or JPEG file, on white.

        On narrower screens than ``least_width`` pixels it scrolls sideways instead of shrinking.
        Raises PosefabricError for other bytes.
        """
        media = next((name for start, name in _MEDIA.items() if data.startswith(start)), None)
        if media is None:
            raise PosefabricError(
                f"report, {self.title}: a figure must be SVG, PNG or JPEG, got {data[:8]!r}"
            )
        encoded = base64.b64encode(data).decode("ascii")
        width = f' style="min-width:{int(least_width)}px"' if least_width else ""
        text = html.escape(alt or caption)
        below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
        self.blocks.append(
            f'<figure><div class="wide paper"><img src="data:{media};base64,{encoded}" '
            f'alt="{text}"{width}></div>{below}</figure>'
        )
        return self

    def add_image(self, image: np.ndarray, *, caption: str = "", quality: int = 88) -> Section:
        """A picture (H, W, 3) uint8 RGB, stored as JPEG."""
        options = [cv2.IMWRITE_JPEG_QUALITY, quality]
        done, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)
        if not done:
            raise PosefabricError(f"report, {self.title}: cannot encode a picture {image.shape}")
        return self.add_figure(data.tobytes(), caption=caption)

    def add_charts(self, charts: Mapping[str, Sequence[Series]], **options: Any) -> Section:
        """Line charts side by side, title to lines; empty ones are left out."""
        drawn = [line_chart(lines, title=title, **options) for title, lines in charts.items()]
        if any(drawn):
            self.blocks.append(f'<div class="charts">{"".join(drawn)}</div>')
        return self

    def add_details(self, summary: str, text: str) -> Section:
        """Preformatted text that opens on a click."""
        self.blocks.append(
            f"<details><summary>{html.escape(summary)}</summary>"
            f"<pre>{html.escape(text)}</pre></details>"
        )
        return self

    def add_code(self, text: str) -> Section:
        """Preformatted text, such as commands."""
        self.blocks.append(f"<pre>{html.escape(text)}</pre>")
        return self

    def html(self) -> str:
        heading = f"<h2>{html.escape(self.title)}</h2>"
        return f'<section id="{_anchor(self.title)}">{heading}{"".join(self.blocks)}</section>'


def render_report(*, title: str, sections: Sequence[Section], lead: str = "") -> str:
    """The whole page; ``lead`` is one line below the title."""
    links = "".join(
        f'<a href="#{_anchor(section.title)}">{html.escape(section.title)}</a>'
        for section in sections
    )
    below = f"<p>{html.escape(lead)}</p>" if lead else ""
    body = "\n".join(section.html() for section in sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>\n"
        f"<header><h1>{html.escape(title)}</h1>{below}<nav>{links}</nav></header>\n"
        f"<main>{body}</main>\n</body></html>\n"
    )


def write_report(
    path: Path | str, *, title: str, sections: Sequence[Section], lead: str = ""
) -> Path:
    """Write :func:`render_report` to ``path`` in one step; PosefabricError if it cannot be."""
    path = Path(path)
    write_atomic(path, render_report(title=title, sections=sections, lead=lead).encode())
    return path


def _cell(cell: Cell | str | float | int | None) -> str:
    if not isinstance(cell, Cell):
        return f"<td>{html.escape(_say(cell))}</td>"
    classes = f' class="{cell.tone}"' if cell.tone else ""
    bar = ""
    if cell.bar is not None:
        share = 100 * min(max(float(cell.bar), 0.0), 1.0)
        bar = f'<i class="bar" style="width:{share:.1f}%"></i>'
    return f"<td{classes}>{bar}<span>{html.escape(cell.text)}</span></td>"


def _say(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_say(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_say(item) for item in value)
    return str(value)


def _anchor(title: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in title.lower()).strip("-")
