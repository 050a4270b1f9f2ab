"""Checks every split of a data folder and draws its contact sheets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from posefabric.data.check import check_coco
from posefabric.data.coco import read_coco
from posefabric.data.contact_sheet import draw_contact_sheet
from posefabric.data.crop import CropGeometry
from posefabric.data.layout import SplitFiles, find_splits, guess_skeleton
from posefabric.structures import DataError

MOST_SUSPECTS = 10


def check_folder(
    path: Path,
    *,
    skeleton: str | None,
    images: Path | None,
    out: Path | None,
    say: Callable[[str], None],
) -> bool:
    """Say what is wrong with each split under ``path``; True when nothing is an error.

    With ``out``, a contact sheet SPLIT.png of each readable split is written there.
    """
    ok = True
    for split in find_splits(path):
        if images is not None:
            split = SplitFiles(annotations=split.annotations, images=images)
        ok = _check_split(split, skeleton=skeleton, out=out, say=say) and ok
    return ok


def _check_split(
    split: SplitFiles, *, skeleton: str | None, out: Path | None, say: Callable[[str], None]
) -> bool:
    try:
        chosen = guess_skeleton(split.annotations, skeleton)
    except DataError as error:
        say(f"ERROR {error}")
        return False
    report = check_coco(split.annotations, split.images, chosen)
    for line in report.lines():
        say(line)
    if report.suspects:
        shown = ", ".join(map(str, report.suspects[:MOST_SUSPECTS]))
        say(
            f"  look at annotations {shown}{' ...' if len(report.suspects) > MOST_SUSPECTS else ''}"
        )
    if out is not None:
        try:
            dataset = read_coco(split.annotations, split.images, chosen)
            geometry = CropGeometry(input_wh=(192, 192), preset="hrnet")
            target = out / f"{split.annotations.stem}.png"
            say(f"contact sheet: {draw_contact_sheet(dataset, geometry, target)}")
        except DataError as error:
            say(f"no contact sheet: {error}")
    return report.ok
