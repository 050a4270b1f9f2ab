"""Pictures in WebDataset shards: read in any order through an index, each exactly once an epoch.

A shard is a tar file as the webdataset package writes and reads them. Its own readers stream
through shards and promise neither whole epochs nor a place to go on from; the index says where
each picture's bytes lie, so that here they are read like files are.
"""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from posefabric.data.image import decode_image
from posefabric.structures import DataError, Person

INDEX_NAME = "index.json"
FORMAT_VERSION = 1
MOST_OPEN = 64


@dataclass(frozen=True)
class ShardIndex:
    """Where the pictures of one split lie.

    Attributes:
        folder: of the shards and of ``index.json``.
        source: the format of the split's annotation file, coco or mpii.
        shards: file names. sizes: (S,) their bytes.
        names: (N,) bytes, the pictures' file names, sorted.
        shard, offset, length: (N,) each picture's shard and its bytes there.
    """

    folder: Path
    source: str
    shards: tuple[str, ...]
    sizes: np.ndarray
    names: np.ndarray
    shard: np.ndarray
    offset: np.ndarray
    length: np.ndarray

    def find(self, name: str) -> int:
        """The row of a picture; -1 when it is in no shard."""
        wanted = name.encode("utf-8", "surrogateescape")
        row = int(np.searchsorted(self.names, wanted))
        return row if row < len(self.names) and self.names[row] == wanted else -1


def read_index(folder: Path) -> ShardIndex:
    """The index of a folder of shards, all of which have to be there, whole.

    Raises DataError that names the file and says what to do.
    """
    path = folder / INDEX_NAME
    again = "write the shards again with `posefabric data shard`"
    try:
        tree: dict[str, Any] = json.loads(path.read_bytes())
        version = tree["format_version"]
        if version != FORMAT_VERSION:
            raise DataError(
                f"{path}: format version {version}, this posefabric reads {FORMAT_VERSION}; {again}"
            )
        pictures = tree["pictures"]
        names = np.array([name.encode("utf-8", "surrogateescape") for name in pictures["name"]])
        order = np.argsort(names)
        index = ShardIndex(
            folder=folder,
            source=str(tree["format"]),
            shards=tuple(entry["file"] for entry in tree["shards"]),
            sizes=np.array([entry["bytes"] for entry in tree["shards"]], np.int64),
            names=names[order],
            **{
                key: np.array(pictures[key], np.int64)[order]
                for key in ("shard", "offset", "length")
            },
        )
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: no such file; data.format=shards expects a folder that `posefabric data "
            f"shard SRC OUT` has written to the end; other data has data.format=coco or mpii"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged ({error!r}); {again}") from error
    for name, expected in zip(index.shards, index.sizes.tolist(), strict=True):
        try:
            found = (folder / name).stat().st_size
        except OSError as error:
            raise DataError(
                f"{folder / name}: a shard of {INDEX_NAME} is missing ({error.strerror}); copy it "
                f"or link to it there"
            ) from error
        if found != expected:
            raise DataError(
                f"{folder / name}: {found} bytes, {INDEX_NAME} says {expected}; copy it anew"
            )
    return index


class ShardPictures:
    """Reads persons' pictures out of shards; call it with a person of that data set.

    ``images``: what the names of persons' files begin with. Shards are opened when first read.
    """

    def __init__(self, index: ShardIndex, images: Path) -> None:
        self.index = index
        self.images = images
        self._open: OrderedDict[int, int] = OrderedDict()
        self._process = os.getpid()
        # Two loaders of one process may read at a time, each by a thread.
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_open": OrderedDict()}
        del state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def __del__(self) -> None:
        if getattr(self, "_process", None) == os.getpid():
            for descriptor in self._open.values():
                os.close(descriptor)

    def __call__(self, person: Person) -> np.ndarray:
        """(H, W, 3) uint8 RGB; DataError that names shard and picture."""
        row = self.row(person)
        shard, length = int(self.index.shard[row]), int(self.index.length[row])
        path = self.index.folder / self.index.shards[shard]
        label = f"{path}: {self._name(person)}"
        try:
            # With a place of its own: descriptors are shared with forked workers.
            with self._lock:
                data = os.pread(self._descriptor(shard, path), length, int(self.index.offset[row]))
        except OSError as error:
            raise DataError(f"{label}: cannot be read: {error.strerror}") from error
        if len(data) != length:
            raise DataError(f"{label}: {len(data)} of {length} bytes; copy the shard anew")
        return decode_image(data, label)

    def row(self, person: Person) -> int:
        """The picture's row in the index; DataError when it is in no shard."""
        row = self.index.find(self._name(person))
        if row < 0:
            raise DataError(
                f"{self.index.folder}: the picture {self._name(person)} of annotation "
                f"{person.annotation_id} is in no shard; write the shards again from these "
                f"annotations"
            )
        return row

    def groups(self, persons: list[Person]) -> np.ndarray:
        """(len(persons),) int64: the shard of each person's picture."""
        rows = [self.row(person) for person in persons]
        return self.index.shard[rows]

    def _name(self, person: Person) -> str:
        return Path(os.path.relpath(person.file, self.images)).as_posix()

    def _descriptor(self, shard: int, path: Path) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        while len(self._open) >= MOST_OPEN:
            os.close(self._open.popitem(last=False)[1])
        self._open[shard] = os.open(path, os.O_RDONLY)
        return self._open[shard]
