"""What every group of the bench is given: how thorough to be, where, and the time that is left."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from posefabric.bench.rows import Line, Missing, Row
from posefabric.bench.subjects import SUBJECTS, Subject
from posefabric.bench.timing import Clock, Rounds
from posefabric.data.synthetic import synthetic_people, write_coco
from posefabric.skeletons import load_skeleton
from posefabric.structures import PosefabricError

NO_GPU = "no GPU: torch sees none here"


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        seconds: of the whole bench.
        steps, forwards, evaluations: rounds of training steps, of forward passes and of
            evaluations of a data set.
        reserve: seconds that must be left for a comparison to begin.
        processes_memory: fresh processes an arm whose peak is taken.
        loader_steps: steps whose waiting counts, a number of workers and a size.
        loader_batch: images of such a step.
        epoch: persons of the epoch over which the workers' memory is watched.
        pictures: JPEG files that are made to be read.
        evaluated: persons whose evaluation is timed, with a network and by OKS alone.
        launches: rounds of whole trainings in one and in two processes.
        launch_steps: their steps.
    """

    seconds: float
    steps: Rounds
    forwards: Rounds
    evaluations: Rounds
    reserve: float
    processes_memory: int
    loader_steps: int
    loader_batch: int
    epoch: int
    pictures: int
    evaluated: tuple[int, int]
    launches: int
    launch_steps: int


FULL = Effort(
    seconds=870.0,
    steps=Rounds(warmup=2, rounds=7, least=3, seconds=30.0),
    forwards=Rounds(warmup=2, rounds=15, least=3, seconds=15.0),
    evaluations=Rounds(warmup=1, rounds=7, least=3, seconds=15.0),
    reserve=30.0,
    processes_memory=1,
    loader_steps=6,
    loader_batch=8,
    epoch=1600,
    pictures=48,
    evaluated=(16, 2000),
    launches=2,
    launch_steps=8,
)
QUICK = Effort(
    seconds=165.0,
    steps=Rounds(warmup=1, rounds=3, least=2, seconds=4.0),
    forwards=Rounds(warmup=1, rounds=5, least=2, seconds=2.0),
    evaluations=Rounds(warmup=1, rounds=3, least=2, seconds=3.0),
    reserve=10.0,
    processes_memory=1,
    loader_steps=4,
    loader_batch=2,
    epoch=400,
    pictures=16,
    evaluated=(16, 400),
    launches=1,
    launch_steps=6,
)


@dataclass(frozen=True)
class Place:
    """A row's name and the device it is measured on."""

    name: str
    device: str


@dataclass
class Bench:
    """One run of the bench.

    Attributes:
        quick: smaller batches too, not only fewer rounds.
        folder: for files of this run; it is the caller's to remove.
        say: prints a line of progress.
        subjects: what is measured.
    """

    quick: bool
    effort: Effort
    folder: Path
    say: Callable[[str], None] = lambda line: None
    subjects: Sequence[Subject] = SUBJECTS
    clock: Clock = time.monotonic
    _began: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._began = self.clock()

    def left(self) -> float:
        """Seconds until the bench's time is up."""
        return self.effort.seconds - (self.clock() - self._began)

    def too_late(self, name: str, *, needs: float = 0.0) -> Missing | None:
        """Why a comparison may not begin any more, as its row; None when it may.

        ``needs``: seconds, where a comparison needs more than the reserve.
        """
        if self.left() >= max(needs, self.effort.reserve):
            return None
        group = name.partition(".")[0]
        spent = f"the bench's {self.effort.seconds:.0f} s were used up before"
        return Missing(name, f"{spent} (try --only {group})")

    def places(self, name: str) -> Iterator[Place | Missing]:
        """Where a row is measured, on the CPU and on the GPU, or why not, one at a time."""
        yield self.too_late(name) or Place(name, "cpu")
        gpu = f"{name}.gpu"
        if not torch.cuda.is_available():
            yield Missing(gpu, NO_GPU)
        else:
            yield self.too_late(gpu) or Place(gpu, "cuda")

    def attempt(self, name: str, measure: Callable[[], Row]) -> Line:
        """The row, or that and why it could not be measured: one failure does not end the rest."""
        try:
            return measure()
        except PosefabricError as error:
            return Missing(name, f"failed: {error}")

    def within(self, plan: Rounds) -> Rounds:
        """The plan, cut to the time that is left."""
        return dataclasses.replace(plan, seconds=min(plan.seconds, max(0.0, self.left())))

    def pictures(self, skeleton: str) -> Path:
        """A folder with JPEG pictures of 640 x 480 in COCO's layout, split train; made once."""
        root = self.folder / f"pictures-{skeleton}"
        if not (root / "annotations" / "train.json").is_file():
            people = synthetic_people(
                count=self.effort.pictures,
                seed=0,
                skeleton=load_skeleton(skeleton),
                picture_wh=(640, 480),
            )
            write_coco(people, root, "train")
        return root
