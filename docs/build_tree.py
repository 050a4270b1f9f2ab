"""Writes README's list of files from the first line of each module's docstring."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- files -->", "<!-- end of files -->"
STAGES = (
    "",
    "run",
    "skeletons",
    "data",
    "space",
    "models",
    "evaluate",
    "train",
    "derive",
    "search",
    "deploy",
    "bench",
)


def first_line(path: Path) -> str:
    """The first sentence of a module's docstring, on one line."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return " ".join(text.split("\n\n")[0].split()).rstrip(".")


def tree() -> str:
    """The list, stage by stage in the order that data flows."""
    lines = ["```"]
    for stage in STAGES:
        folder = ROOT / "posefabric" / stage
        lines.append(f"posefabric/{stage + '/' if stage else ''}")
        for path in sorted(folder.glob("*.py")):
            line = first_line(path)
            if line:
                lines.append(f"  {path.name:<22} {line}")
    return "\n".join([*lines, "```"])


def updated(readme: str) -> str:
    """README with the list between its two markers made anew."""
    before, rest = readme.split(START)
    _, after = rest.split(END)
    return f"{before}{START}\n{tree()}\n{END}{after}"


def main() -> None:
    path = ROOT / "README.md"
    text = path.read_text()
    if "--check" in sys.argv:
        raise SystemExit(updated(text) != text)
    path.write_text(updated(text))


if __name__ == "__main__":
    main()
