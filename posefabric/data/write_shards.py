"""Writes the pictures of a data set as WebDataset shards, with an index."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from posefabric.config import DataConfig
from posefabric.data.pipeline import Split, open_dataset
from posefabric.data.shards import FORMAT_VERSION, INDEX_NAME
from posefabric.run import write_atomic
from posefabric.structures import DataError, Person, PersonDataset, PosefabricError

SPLITS: tuple[Split, ...] = ("train", "val", "test")
Progress = Callable[[int, int], None]


def write_shards(
    config: DataConfig,
    out: Path,
    *,
    per_shard: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, dict[str, int]]:
    """Write every split of ``config`` whose annotation file is there; counts by split.

    ``out`` gets the annotation files as they are, under their own names, and in the place of each
    folder of pictures a folder of shards, so that the same options with ``data.format=shards``
    read it. Pictures without a person to use are left out; encoded bytes stay as they are. The
    training pictures are shuffled (by ``seed``) over the shards, others keep their order. Each
    sample has ``__key__``, the picture under its extension, and ``json``: its persons.

    Raises PosefabricError when there is nothing to write, ``out`` has shards already, or the
    package webdataset is missing; and DataError for a picture that is missing.
    """
    webdataset = _webdataset()
    if config.format not in ("coco", "mpii"):
        raise PosefabricError(
            f"data.format={config.format}: shards are written from coco or mpii data; synthetic "
            f"people are files after `posefabric data synthetic OUT`"
        )
    if per_shard < 1:
        raise PosefabricError(f"--per-shard {per_shard}: expected at least one picture")
    root = Path(str(config.root))
    if not root.is_dir():
        raise PosefabricError(f"{root}: no such folder")
    found: list[Split] = [
        split
        for split in SPLITS
        if (name := getattr(config, f"{split}_annotations")) and (root / name).is_file()
    ]
    if not found:
        names = [getattr(config, f"{split}_annotations") for split in SPLITS]
        raise PosefabricError(
            f"{root}: holds none of {', '.join(filter(None, names))}; name the files with "
            f"data.train_annotations=... and so on"
        )
    folders = [getattr(config, f"{split}_images") for split in found]
    if len(set(folders)) < len(folders) and config.format == "coco":
        raise PosefabricError(
            f"{root}: splits share the folder {folders[0]}; shards need one for each; give "
            f"data.val_images another name and link the pictures there"
        )
    done: dict[str, dict[str, int]] = {}
    for split in found:
        images = getattr(config, f"{split}_images")
        annotations = getattr(config, f"{split}_annotations")
        target = out / images
        if (target / INDEX_NAME).exists():
            raise PosefabricError(f"{target}: holds shards already; choose another OUT")
        dataset = open_dataset(config, split, evaluating=True)
        counts = _write_split(
            dataset,
            root / images,
            target,
            webdataset=webdataset,
            per_shard=per_shard,
            seed=seed if split == "train" else None,
            source=config.format,
            progress=progress,
        )
        (out / annotations).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / annotations, out / annotations)
        done[split] = counts
    if config.headboxes is not None and (root / config.headboxes).is_file():
        (out / config.headboxes).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / config.headboxes, out / config.headboxes)
    return done


def _webdataset() -> Any:
    try:
        import webdataset
    except ImportError as error:
        raise PosefabricError(
            "posefabric data shard needs the package webdataset; install it with `pip install "
            "'posefabric[data]'` (reading shards does not need it)"
        ) from error
    return webdataset


def _write_split(
    dataset: PersonDataset,
    images: Path,
    target: Path,
    *,
    webdataset: Any,
    per_shard: int,
    seed: int | None,
    source: str,
    progress: Progress | None,
) -> dict[str, int]:
    persons: dict[str, list[Person]] = {}
    for person in dataset.persons:
        persons.setdefault(person.file, []).append(person)
    files = list(persons)
    if seed is not None:
        files = [files[i] for i in np.random.default_rng(seed).permutation(len(files))]
    target.mkdir(parents=True, exist_ok=True)
    for stale in target.glob("shard-*.tar"):
        stale.unlink()  # of a writing that was cut off: it left no index
    shards: list[dict[str, Any]] = []
    table: dict[str, list[Any]] = {"name": [], "shard": [], "offset": [], "length": []}
    for start in range(0, len(files), per_shard):
        path = target / f"shard-{len(shards):06d}.tar"
        chosen = files[start : start + per_shard]
        # No times, users or counters in it: the same pictures give the same bytes.
        with path.open("wb") as stream, webdataset.TarWriter(stream, encoder=False, mtime=0) as tar:
            for number, file in enumerate(chosen, start=start):
                tar.write(_sample(number, Path(file), images, persons[file]))
                if progress is not None:
                    progress(number + 1, len(files))
        with tarfile.open(path) as written:
            places = {m.name: m for m in written if not m.name.endswith(".json")}
        for number, file in enumerate(chosen, start=start):
            member = places[f"{number:09d}{Path(file).suffix.lower() or '.bin'}"]
            table["name"].append(Path(file).relative_to(images).as_posix())
            table["shard"].append(len(shards))
            table["offset"].append(member.offset_data)
            table["length"].append(member.size)
        shards.append(
            {
                "file": path.name,
                "bytes": path.stat().st_size,
                "pictures": len(chosen),
                "persons": sum(len(persons[file]) for file in chosen),
            }
        )
    index = {
        "format_version": FORMAT_VERSION,
        "format": source,
        "skeleton": dataset.skeleton.name,
        "shards": shards,
        "pictures": table,
    }
    # Last: a folder with an index is complete.
    write_atomic(target / INDEX_NAME, json.dumps(index).encode() + b"\n")
    return {"shards": len(shards), "pictures": len(files), "persons": len(dataset.persons)}


def _sample(number: int, file: Path, images: Path, persons: list[Person]) -> dict[str, Any]:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError(
            f"{file}: cannot be read ({error.strerror}); fetch the picture again or take it out "
            f"of the annotations"
        ) from error
    described = {
        "file_name": file.relative_to(images).as_posix(),
        "image_id": persons[0].image_id,
        "persons": [
            {
                "annotation_id": person.annotation_id,
                "box_xywh": person.box_xywh.tolist(),
                "keypoints": person.keypoints.tolist(),
                "visibility": person.visibility.tolist(),
                "area": float(person.area),
            }
            for person in persons
        ],
    }
    return {
        "__key__": f"{number:09d}",
        (file.suffix.lower() or ".bin")[1:]: data,
        "json": json.dumps(described).encode(),
    }
