"""What tests of the bench share: a tiny subject, little effort, stand-ins for processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from posefabric.bench.context import QUICK, Bench, Effort
from posefabric.bench.subjects import Subject
from posefabric.bench.timing import Rounds

ONE = Rounds(warmup=0, rounds=1, least=1)
TINY = Subject(
    name="tiny",
    base=None,
    overrides=(
        "data.input_wh=[64,64]",
        "model.backbone=test_efficientnet",
        "model.channel_factor=2",
        "model.parts=1",
        "derive.operations_kept=1",
        "derive.sources_kept=1",
    ),
    batch=2,
    quick_batch=2,
)
LITTLE = Effort(
    **{
        **vars(QUICK),
        "seconds": 1e6,
        "steps": ONE,
        "forwards": ONE,
        "evaluations": ONE,
        "loader_steps": 1,
        "loader_batch": 2,
        "epoch": 64,
        "pictures": 2,
        "evaluated": (2, 40),
        "launch_steps": 4,
    }
)


def make_bench(folder: Path, **options: Any) -> Bench:
    settings = {"quick": True, "effort": LITTLE, "folder": folder, "subjects": [TINY]}
    return Bench(**{**settings, **options})


class FakeClock:
    """A clock that stands still but for what is added to ``now``."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeGate:
    """Gives ``turns`` turns and keeps the answers."""

    def __init__(self, turns: int = 1) -> None:
        self.turns = turns
        self.answers: list[Any] = []

    def turn(self) -> bool:
        self.turns -= 1
        return self.turns >= 0

    def answer(self, value: Any) -> None:
        self.answers.append(value)


def inline(target: Callable[..., None], *, alone: bool = False, **options: Any) -> Any:
    """``once`` in this process."""
    gate = FakeGate()
    target(gate, **options)
    return gate.answers[0]


class CannedProcess:
    """In the place of ``Fresh``: answers by the name of its target, and notes how it was made."""

    answers: ClassVar[dict[str, Any]] = {}
    made: ClassVar[list[tuple[str, bool, dict[str, Any]]]] = []

    def __init__(self, target: Callable[..., None], *, alone: bool = False, **options: Any) -> None:
        self.name = target.__name__
        self.made.append((self.name, alone, options))

    def __enter__(self) -> CannedProcess:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def ask(self) -> Any:
        answer = self.answers[self.name]
        if isinstance(answer, Exception):
            raise answer
        return answer
