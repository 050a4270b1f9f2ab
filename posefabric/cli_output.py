"""What every command prints with: lines, tables, a counter."""

from __future__ import annotations

import os
import sys

from posefabric.distributed import is_first

WIDTH_OF_FILES = 160  # columns; cells that do not fit are cut short


def counter(what: str):
    """A progress callback that rewrites one line on a terminal and is silent elsewhere."""

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty() and is_first():
            end = "\n" if done >= total else ""
            print(f"\r{done} of {total} {what}", end=end, file=sys.stderr, flush=True)

    return show


def say(text: str) -> None:
    """Print a line at once, also into a pipe; of several processes, only the first."""
    if is_first():
        print(text, flush=True)


def show(renderable: object) -> None:
    """Print a rich table: as wide as the terminal, or wide enough for all of it in a file."""
    from rich.console import Console

    if not is_first():
        return
    console = Console(highlight=False)
    if not (console.is_terminal or "COLUMNS" in os.environ):
        console.width = WIDTH_OF_FILES
    console.print(renderable)


def print_table(result: dict) -> None:
    """Print an evaluation."""
    from posefabric.evaluate.runner import table

    show(table(result))
