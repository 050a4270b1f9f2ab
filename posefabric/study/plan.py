"""A study file: arms, seeds, budgets and claims, and the runs they come to."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from posefabric.config import Config, check_trainable, load_config
from posefabric.run.resume import computed_options
from posefabric.section import Section
from posefabric.skeletons import load_skeleton
from posefabric.structures import PosefabricError

Steps = Literal["search", "search+finetune", "train"]
_NAME = r"[A-Za-z0-9][A-Za-z0-9_.+-]*"
EQUAL = "+compute"  # ends the name of an arm's runs at equal total compute
# Of a configuration, these change nothing of what a run learns.
_LABELS = ("name",)
_FILES = ("data.skeleton", "model.weights")


class Arm(Section):
    """One way to get a network; all arms share the study's configuration and overrides.

    ``seeds``: those of the study's that this arm is run with; none: all.
    """

    overrides: list[str] = Field(default=[])
    seeds: list[int] | None = None
    steps: Steps = "search+finetune"
    compute: Literal["epochs", "equal", "both"] = "epochs"
    compute_of: str | None = None

    @field_validator("steps", mode="before")
    @classmethod
    def _spelled(cls, value: Any) -> Any:
        """``search, derive, finetune`` as a list or a text is ``search+finetune``."""
        words = re.split(r"[\s,+]+", value) if isinstance(value, str) else value
        if isinstance(words, list) and words == ["search", "derive", "finetune"]:
            return "search+finetune"
        return "+".join(words) if isinstance(words, list) else value


class Claim(Section):
    """``better`` has more of ``measure`` than ``than`` together, or no less than each of
    ``not_below`` (within ``margin``).
    """

    claim: str
    better: str
    than: list[str] = Field(default=[])
    not_below: list[str] = Field(default=[])
    measure: str = "PCK"
    alpha: float = Field(default=0.05, gt=0, lt=1)
    margin: float = Field(default=0.0, ge=0)

    @field_validator("than", "not_below", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_kind(self) -> Claim:
        if bool(self.than) == bool(self.not_below):
            raise ValueError(f"claim {self.claim!r}: give `than` or `not_below`, one of them")
        if self.better in (*self.than, *self.not_below):
            raise ValueError(f"claim {self.claim!r}: {self.better} is compared with itself")
        return self


class StudyFile(Section):
    """What a study's YAML says."""

    name: str
    config: str | None = None
    overrides: list[str] = Field(default=[])
    seeds: list[int] = Field(default=[0, 1, 2], min_length=1)
    arms: dict[str, Arm] = Field(min_length=1)
    budgets: dict[str, list[str]] = Field(default={})
    claims: list[Claim] = Field(default=[])

    @field_validator("arms", mode="before")
    @classmethod
    def _plain_arms(cls, value: Any) -> Any:
        """An arm without options is the study's configuration as it is."""
        if isinstance(value, dict):
            return {name: {} if arm is None else arm for name, arm in value.items()}
        return value

    @model_validator(mode="after")
    def _consistent(self) -> StudyFile:
        for name in (*self.arms, *self.budgets):
            if not re.fullmatch(_NAME, name):
                raise ValueError(f"{name!r}: a name is letters, digits and any of _ . + -")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds: expected different ones, got {self.seeds}")
        for name, arm in self.arms.items():
            if name.endswith(EQUAL):
                raise ValueError(f"arm {name}: {EQUAL} ends names of runs at equal compute")
            if arm.seeds is not None and (not arm.seeds or not {*arm.seeds} <= {*self.seeds}):
                raise ValueError(
                    f"arm {name}: seeds: expected some of {self.seeds}, got {arm.seeds}"
                )
            if arm.compute != "epochs":
                self.reference_of(name)
        known = self.variants()
        for claim in self.claims:
            for name in (claim.better, *claim.than, *claim.not_below):
                if name not in known:
                    raise ValueError(
                        f"claim {claim.claim!r}: there is no arm {name}; there are "
                        f"{', '.join(known)}"
                    )
        return self

    def reference_of(self, name: str) -> str:
        """The arm whose compute the arm ``name`` is to be given."""
        arm = self.arms[name]
        if arm.steps != "train":
            raise ValueError(f"arm {name}: compute: {arm.compute} is for arms with steps: train")
        searched = [n for n, a in self.arms.items() if a.steps == "search+finetune"]
        wanted = arm.compute_of or (searched[0] if len(searched) == 1 else None)
        if wanted not in searched:
            raise ValueError(
                f"arm {name}: compute: {arm.compute} needs compute_of: ARM, an arm with steps: "
                f"search+finetune ({', '.join(searched) or 'there is none'}), got {wanted}"
            )
        return wanted

    def variants(self) -> dict[str, tuple[str, bool]]:
        """Name in rows and tables to (arm, whether at the total compute of a search)."""
        found = {}
        for name, arm in self.arms.items():
            if arm.compute != "equal":
                found[name] = (name, False)
            if arm.compute == "equal":
                found[name] = (name, True)
            if arm.compute == "both":
                found[name + EQUAL] = (name, True)
        return found


@dataclass(frozen=True)
class PlannedRun:
    """One arm with one seed under one budget.

    Attributes:
        arm: the name in rows and tables, with ``+compute`` for the second of ``compute: both``.
        key: the hash of all that decides the result.
        overrides: of ``config_name``, in the order they apply.
        reference: at equal compute, the key of the run whose compute it gets; else None.
    """

    arm: str
    steps: Steps
    seed: int
    budget: str
    key: str
    config_name: str | None
    overrides: tuple[str, ...]
    config: Config
    reference: str | None = None

    @property
    def folder(self) -> str:
        pieces = [self.budget] if self.budget else []
        return "-".join([*pieces, self.arm, f"s{self.seed}", self.key[:8]])

    @property
    def title(self) -> str:
        return f"{self.arm}{f' ({self.budget})' if self.budget else ''}, seed {self.seed}"


def shipped_studies() -> dict[str, Path]:
    """Name to path of the studies in the package."""
    folder = Path(str(resources.files("posefabric"))) / "configs" / "study"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_study(name_or_path: str) -> StudyFile:
    """Read a shipped study or a YAML file; PosefabricError names the file and the option."""
    shipped = shipped_studies()
    path = shipped.get(name_or_path, Path(name_or_path))
    if not path.is_file():
        raise PosefabricError(
            f"{name_or_path}: no such study file or shipped study; shipped: {', '.join(shipped)}"
        )
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PosefabricError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(tree, dict):
        raise PosefabricError(f"{path}: expected name, config, seeds and arms")
    try:
        study = StudyFile.model_validate(tree)
    except ValidationError as error:
        lines = [
            f"{path}: {'.'.join(str(p) for p in item['loc']) or 'the study'}: {item['msg']}"
            for item in error.errors()
        ]
        raise PosefabricError("\n".join(lines)) from error
    beside = path.parent / str(study.config)
    if study.config is not None and beside.is_file():
        study.config = str(beside)
    return study


def plan_runs(study: StudyFile, given: Sequence[str] = ()) -> list[PlannedRun]:
    """Every run of a study, seed by seed, so that arms can be compared early.

    ``given``: overrides of the command line, above all others. Raises PosefabricError for a
    configuration that is not valid or does not fit its arm's steps, before anything runs.
    """
    budgets = study.budgets or {"": []}
    planned: list[PlannedRun] = []
    for budget, budget_overrides in budgets.items():
        first: dict[str, str] = {}
        for seed in study.seeds:
            made: dict[str, PlannedRun] = {}
            # Runs at equal compute need the key of the search they are measured by.
            for name, (arm_name, equal) in sorted(
                study.variants().items(), key=lambda item: item[1][1]
            ):
                arm = study.arms[arm_name]
                if arm.seeds is not None and seed not in arm.seeds:
                    continue
                overrides = (*study.overrides, *budget_overrides, *arm.overrides, f"seed={seed}")
                config = _checked_config(study, (*overrides, *given), arm, name)
                reference = _reference(study.reference_of(arm_name), made, first) if equal else None
                made[name] = PlannedRun(
                    arm=name,
                    steps=arm.steps,
                    seed=seed,
                    budget=budget,
                    key=_hash(config, arm.steps, reference),
                    config_name=study.config,
                    overrides=(*overrides, *given),
                    config=config,
                    reference=reference,
                )
            planned += made.values()
            first = {**{name: run.key for name, run in made.items()}, **first}
    return planned


def _reference(name: str, made: Mapping[str, PlannedRun], first: Mapping[str, str]) -> str:
    """The key of an arm's run of the same seed, or, where it has none, of its first."""
    if name in made:
        return made[name].key
    if name in first:
        return first[name]
    raise PosefabricError(
        f"arm {name}: others are to be given its compute, but its seeds begin after theirs; give "
        f"it the study's first seed"
    )


def _checked_config(study: StudyFile, overrides: Sequence[str], arm: Arm, name: str) -> Config:
    try:
        config = load_config(study.config, overrides)
        if arm.steps != "train":
            check_trainable(config, "search")
        load_skeleton(config.data.skeleton)
    except PosefabricError as error:
        raise PosefabricError(f"arm {name}: {error}") from error
    if config.data.root is not None and Path(config.data.root).exists():
        config.data.root = str(Path(config.data.root).resolve())
    if Path(config.model.weights).is_file():
        config.model.weights = str(Path(config.model.weights).resolve())
    return config


def _hash(config: Config, steps: Steps, reference: str | None) -> str:
    options = computed_options(config)
    for name in _LABELS:
        options.pop(name)
    for name in _FILES:
        # What a file says counts, not where it lies.
        if Path(str(options[name])).is_file():
            data = Path(options[name]).read_bytes()
            options[name] = f"sha256 {hashlib.sha256(data).hexdigest()}"
    what = {"options": options, "steps": steps, "compute of": reference}
    text = json.dumps(what, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
