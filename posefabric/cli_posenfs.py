"""The commands about the paper's released code: its checkpoints and its reference values."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from posefabric.cli_output import say
from posefabric.structures import PosefabricError

Out = Annotated[Path, Parameter(help="the run folder to write")]


def import_posenfs(checkpoint: Path, config: Path, /, *overrides: str, out: Out) -> None:
    """Import a released PoseNFS checkpoint as a finished search run.

    Parameters
    ----------
    checkpoint
        The .tar (or .pth) file; no pickled code in it is run.
    config
        The YAML of the released code that the checkpoint was trained with.
    """
    from posefabric.search.import_posenfs import import_posenfs as run_import

    run, record = run_import(checkpoint, config, out, overrides=_absolute(overrides))
    say(f"{record['tensors']} tensors imported, {record['unused_tensors']} that are never used")
    say(f"outputs differ from the checkpoint's by {record['difference']:.1e} of the largest")
    for note in record["notes"]:
        say(f"note: {note}")
    say(f"written: {run.path}; next: posefabric eval {out} data.root=DIR")


def reference(folder: Path, /) -> None:
    """Compare with reference values of the released code: the largest relative differences.

    Parameters
    ----------
    folder
        Holds NAME.json (the specification) and NAME.npz (heatmaps and gradients).
    """
    from posefabric.evaluate.reference import compare_reference, find_references

    wrong = 0
    for path in find_references(folder):
        say(path.stem)
        for row in compare_reference(path):
            wrong += not row.passed
            verdict = "" if row.passed else "  TOO LARGE"
            say(f"  {row.quantity:>40}: {row.difference:.1e} (limit {row.limit:.0e}){verdict}")
    if wrong:
        raise PosefabricError(f"{wrong} quantities differ by more than their limit")
    say("all within their limits")


def _absolute(overrides: tuple[str, ...]) -> list[str]:
    """Overrides with a data root that later commands find from another folder."""
    found = []
    for text in overrides:
        key, _, value = text.partition("=")
        there = key == "data.root" and Path(value).exists()
        found.append(f"{key}={Path(value).resolve()}" if there else text)
    return found
