"""From the data options of a configuration to persons, crops and batches."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from posefabric.config import AugmentConfig, Config, DataConfig, OptimConfig
from posefabric.data.batch import Normalisation, prepare_batch
from posefabric.data.coco import read_coco
from posefabric.data.codec import Codec, default_sigma
from posefabric.data.conventions import Conventions, choose_conventions
from posefabric.data.crop import CropGeometry
from posefabric.data.device_cache import DeviceCache, fits_device
from posefabric.data.loaders import CropLoader, split_by_image
from posefabric.data.mpii import read_mpii
from posefabric.data.shards import ShardPictures, read_index
from posefabric.data.synthetic import synthetic_people
from posefabric.distributed import place, share
from posefabric.skeletons import Skeleton, load_skeleton
from posefabric.structures import CropBatch, PersonDataset, PoseBatch, PosefabricError

Split = Literal["train", "val", "test"]
TRAINING_MARGIN = 1.5


def has_data(config: DataConfig) -> bool:
    """False where no data is named, as in a run made from a released checkpoint."""
    return config.format == "synthetic" or config.root is not None


def open_dataset(
    config: DataConfig, split: Split, *, boxes: str | None = None, evaluating: bool = False
) -> PersonDataset:
    """The persons of one split. ``boxes``: a detections file instead of ground-truth boxes,
    relative to the working folder or to ``data.root``.

    ``evaluating``: the training split is there to be measured, not to be learned from, and
    keeps its boxes as they are (``data.grow_boxes=train``).

    Raises PosefabricError when ``data.root`` is missing or has no such split.
    """
    if config.format == "shards":
        return _open_shards(config, split, boxes=boxes, evaluating=evaluating)
    skeleton = load_skeleton(config.skeleton)
    if config.format == "synthetic":
        count = {"train": config.synthetic_train}.get(split, config.synthetic_val)
        offset = {"train": 0, "val": 1, "test": 2}[split]
        seed = 3 * config.synthetic_seed + offset
        turn = config.synthetic_turn
        return synthetic_people(count=count, seed=seed, skeleton=skeleton, turn=turn)
    if config.root is None:
        raise PosefabricError(
            "data.root is not set; give the data set's folder on the command line: data.root=DIR"
        )
    root = Path(config.root)
    if not root.is_dir():
        raise PosefabricError(f"data.root={config.root}: no such folder")
    annotations = getattr(config, f"{split}_annotations")
    if annotations is None:
        raise PosefabricError(f"data.{split}_annotations is not set; this data set has no {split}")
    images, name = root / getattr(config, f"{split}_images"), f"{root.name} {split}"
    if config.format == "mpii":
        if boxes is not None:
            raise PosefabricError(
                f"data.boxes={boxes}: MPII's persons come with centre and scale, which its "
                "protocol evaluates; leave data.boxes out"
            )
        heads = config.headboxes if split == "val" else None
        return read_mpii(
            root / annotations,
            images,
            skeleton,
            split=split,
            headboxes=None if heads is None else _found(Path(heads), root),
            name=name,
        )
    grow = make_conventions(config).grow_boxes
    return read_coco(
        root / annotations,
        images,
        skeleton,
        boxes=None if boxes is None else _found(Path(boxes), root),
        box_score_threshold=config.box_score_threshold,
        grow_boxes=grow == "everywhere" or (grow == split and not evaluating),
        name=name,
    )


def _open_shards(
    config: DataConfig, split: Split, *, boxes: str | None, evaluating: bool
) -> PersonDataset:
    """The persons of the annotation file that the shards were written from."""
    if config.root is None:
        raise PosefabricError("data.root is not set; give the shards' folder: data.root=OUT")
    folder = Path(config.root) / getattr(config, f"{split}_images")
    index = read_index(folder)
    plain = config.model_copy(update={"format": index.source})
    dataset = open_dataset(plain, split, boxes=boxes, evaluating=evaluating)
    pictures = ShardPictures(index, folder)
    groups = pictures.groups(dataset.persons)
    return replace(dataset, read_image=pictures, groups=groups)


def _found(path: Path, root: Path) -> Path:
    return root / path if not path.exists() and (root / path).exists() else path


def make_conventions(config: DataConfig) -> Conventions:
    """The preset's conventions, but for those that an option of their own decides."""
    return choose_conventions(
        config.preset,
        grow_boxes=config.grow_boxes,
        box_padding=config.box_padding,
        warp=config.warp,
        stride=config.stride,
        target=config.target,
        outside_weight=config.outside_weight,
        smooth=config.smooth,
        decode=config.decode,
        decode_offset=config.decode_offset,
        missing_coordinate=config.missing_coordinate,
        flip_shift=config.flip_shift,
    )


def make_geometry(config: DataConfig, margin: float = 1.0) -> CropGeometry:
    """How the options make an input of a box; ``margin`` as in CropGeometry."""
    return CropGeometry(config.input_wh, config.preset, margin, make_conventions(config))


def make_codec(config: DataConfig, input_wh: tuple[int, int] | None = None) -> Codec:
    """The codec of the options; heatmaps are a quarter of the input.

    ``input_wh``: of another size than ``data.input_wh``, a given sigma shrunk with it.
    """
    width, height = config.input_wh if input_wh is None else input_wh
    given = None if config.sigma is None else config.sigma * height / config.input_wh[1]
    return Codec(
        preset=config.preset,
        input_wh=(width, height),
        heatmap_wh=(width // 4, height // 4),
        sigma=default_sigma(height) if given is None else given,
        conventions=make_conventions(config),
    )


@dataclass
class TrainingData:
    """Seeded, augmented batches of one data set: a function of (seed, step) alone.

    With ``small_codec`` the first ``small_steps`` batches have its smaller input.
    ``wait_seconds``: how long :meth:`crops` has waited for its loader.
    """

    dataset: PersonDataset
    loader: CropLoader
    geometry: CropGeometry
    codec: Codec
    augment: AugmentConfig
    normalisation: Normalisation
    seed: int
    device: torch.device
    small_codec: Codec | None = None
    small_steps: int = 0
    device_cache: DeviceCache | None = None
    wait_seconds: float = 0.0

    @classmethod
    def open(
        cls,
        config: Config,
        *,
        optim: OptimConfig,
        normalisation: Normalisation,
        seed: int,
        device: torch.device,
        dataset: PersonDataset | None = None,
        rows: np.ndarray | None = None,
    ) -> TrainingData:
        """``rows``: the persons of the data set to use; none: all."""
        dataset = open_dataset(config.data, "train") if dataset is None else dataset
        geometry = make_geometry(config.data, TRAINING_MARGIN)
        count, cache = len(dataset) if rows is None else len(rows), config.data.cache
        on_device = cache == "device" and fits_device(count, geometry, device)
        loader = CropLoader(
            dataset,
            geometry,
            batch_size=min(optim.batch_size, count),
            rows=rows,
            seed=seed,
            workers=config.data.workers,
            cache=bool(cache) and cache != "off" and not on_device,
            on_bad_image=config.data.on_bad_image,
            drop_last=True,
            launch=place(),
            window=config.data.shard_window,
        )
        small = optim.small_input_wh
        return cls(
            dataset=dataset,
            loader=loader,
            geometry=geometry,
            codec=make_codec(config.data),
            augment=config.augment,
            normalisation=normalisation,
            seed=seed,
            device=device,
            small_codec=None if small is None else make_codec(config.data, small),
            small_steps=round(optim.small_input_until * optim.epochs * len(loader)),
            device_cache=DeviceCache(loader, geometry, device) if on_device else None,
        )

    @classmethod
    def open_split(
        cls,
        config: Config,
        *,
        share: float,
        optim: OptimConfig,
        normalisation: Normalisation,
        seed: int,
        device: torch.device,
        dataset: PersonDataset | None = None,
    ) -> tuple[TrainingData, TrainingData | None]:
        """Data for the weights, and ``share`` of the persons held out for the architecture.

        No picture is on both sides, ``seed`` decides which; a share of 0 holds nothing out.
        Raises PosefabricError when a side would have less than two persons.
        """
        dataset = open_dataset(config.data, "train") if dataset is None else dataset
        opened = functools.partial(
            cls.open,
            config,
            optim=optim,
            normalisation=normalisation,
            device=device,
            dataset=dataset,
        )
        if share == 0:
            return opened(seed=seed), None
        pictures = len({person.image_id for person in dataset.persons})
        held_out = rows = np.array([], dtype=np.int64)
        if pictures > 1:
            held_out, rows = split_by_image(dataset, share, seed)
        # A batch norm needs two persons.
        if min(len(held_out), len(rows)) < 2:
            raise PosefabricError(
                f"{dataset.name}: {len(dataset)} persons in {pictures} pictures; holding out "
                f"search.architecture_share={share} of them for the architecture needs two persons "
                f"or more on each side, and no picture on both; give more pictures, another share, "
                f"or search.strategy=synchronous, which holds nothing out"
            )
        # Another seed, or both sides would be augmented alike.
        other = int(np.random.SeedSequence([seed, 1]).generate_state(1)[0])
        return opened(seed=seed, rows=rows), opened(seed=other, rows=held_out)

    @property
    def skeleton(self) -> Skeleton:
        return self.dataset.skeleton

    @property
    def steps_per_epoch(self) -> int:
        return len(self.loader)

    def crops(self, step: int) -> Iterator[tuple[int, CropBatch]]:
        """(step, crops) from ``step`` on, without end."""
        while True:
            epoch, start = divmod(step, self.steps_per_epoch)
            source = self.loader if self.device_cache is None else self.device_cache
            batches = source.batches(epoch, start)
            for _ in range(start, self.steps_per_epoch):
                began = time.perf_counter()
                batch = next(batches)
                self.wait_seconds += time.perf_counter() - began
                yield step, batch
                step += 1

    def prepare(self, crops: CropBatch, step: int) -> PoseBatch:
        """Augmented batch on the device; its randomness depends on (seed, step) only."""
        # Mixed to 32 bits first: of a longer seed a CPU generator uses no more.
        mixed = np.random.SeedSequence([self.seed, step]).generate_state(1)
        generator = torch.Generator().manual_seed(int(mixed[0]))
        return prepare_batch(
            crops,
            geometry=self.geometry,
            codec=self.codec if step >= self.small_steps else self.small_codec or self.codec,
            normalisation=self.normalisation,
            skeleton=self.skeleton,
            augment=self.augment,
            generator=generator,
            device=self.device,
            rows=share(self.loader.batch_size, self.loader.launch),
            whole=self.loader.batch_size,
        )
