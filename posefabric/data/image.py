"""Reading pictures; damage that OpenCV would pass over in silence is found and named."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np

from posefabric.structures import DataError

_PNG_HEAD = b"\x89PNG\r\n\x1a\n"


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """The picture as (H, W, 3) uint8 RGB; grey is repeated, alpha dropped.

    The EXIF orientation is ignored: COCO-style annotations are in the stored pixels.
    Raises DataError for a missing, truncated or undecodable file.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        hint = "" if path.parent.is_dir() else f" (there is no folder {path.parent})"
        raise DataError(f"{path}: no such picture{hint}; check the images folder") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    return decode_image(data, path)


def decode_image(data: bytes, path: str | os.PathLike[str]) -> np.ndarray:
    """The same of an encoded picture in memory; ``path`` is what errors call it."""
    damage = find_truncation(data)
    if damage:
        raise DataError(f"{path}: {damage}; fetch the picture again or leave it out")
    try:
        image = cv2.imdecode(
            np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
        )
    except cv2.error as error:
        raise DataError(f"{path}: cannot be decoded: {error}") from error
    if image is None:
        raise DataError(
            f"{path}: not a picture that OpenCV can decode ({len(data)} bytes, "
            f"starting with {data[:8].hex(' ')}); fetch it again or leave it out"
        )
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def find_truncation(data: bytes) -> str | None:
    """What is missing at the end of an encoded picture, or None.

    ``cv2.imread`` fills the lost part with grey and raises nothing; ``cv2.imdecode`` refuses most
    such files but does not say why.
    """
    if not data:
        return "the file is empty"
    if data.startswith(b"\xff\xd8") and not _jpeg_ends(data):
        return f"truncated JPEG: no end-of-image marker in {len(data)} bytes"
    if data.startswith(_PNG_HEAD) and b"IEND" not in data[-4096:]:
        return f"truncated PNG: no end chunk in {len(data)} bytes"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        stated = int.from_bytes(data[4:8], "little") + 8
        if len(data) < stated:
            return f"truncated WebP: {len(data)} of {stated} bytes"
    return None


def _jpeg_ends(data: bytes) -> bool:
    # Headers are skipped by their lengths: an embedded thumbnail has an end marker of its own.
    # Behind the first scan the marker cannot occur by chance, because scans escape 0xFF.
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:
            position += 1
            continue
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:
            position += 2
            continue
        if marker == 0xDA:
            return data.find(b"\xff\xd9", position) >= 0
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return False
