"""Typed, validated configuration: defaults, then YAML files, then dotted overrides."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from posefabric.options import (
    DeriveConfig,
    EvaluationConfig,
    ModelConfig,
    OptimConfig,
    SearchConfig,
)
from posefabric.options_data import AUGMENTATIONS, AugmentConfig, DataConfig
from posefabric.section import Section
from posefabric.structures import PosefabricError

__all__ = [
    "AUGMENTATIONS",
    "AugmentConfig",
    "Config",
    "DataConfig",
    "DeriveConfig",
    "EvaluationConfig",
    "ModelConfig",
    "OptimConfig",
    "SearchConfig",
    "check_trainable",
    "config_from_tree",
    "load_config",
    "shipped_configs",
    "with_overrides",
]


class Config(Section):
    """Everything an experiment is made of."""

    name: str = "experiment"
    seed: int = Field(default=0, ge=0, lt=2**32)
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N")
    threads: int | None = Field(default=None, ge=1)
    sync_norms: bool = Field(
        default=True,
        description="with several processes, batch norms in training see the whole batch, as in "
        "one process; false: each process's share of it",
    )
    data: DataConfig = Field(default_factory=DataConfig)
    augment: AugmentConfig = Field(default_factory=AugmentConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    search: SearchConfig = Field(default_factory=SearchConfig)
    derive: DeriveConfig = Field(default_factory=DeriveConfig)
    finetune: OptimConfig = Field(default_factory=OptimConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)

    @model_validator(mode="after")
    def _empty_targets(self) -> Config:
        first = self.search if self.model.network == "fabric" else self.finetune
        if self.data.outside_weight and first.loss != "mse":
            raise ValueError(
                "data.outside_weight trains empty targets, which cross-entropy has no answer to; "
                "set search.loss=mse and finetune.loss=mse"
            )
        return self

    @model_validator(mode="after")
    def _small_inputs(self) -> Config:
        width, height = self.data.input_wh
        for phase in ("search", "finetune"):
            small = getattr(self, phase).small_input_wh
            if small is not None and (small[0] > width or small[0] * height != small[1] * width):
                raise ValueError(
                    f"{phase}.small_input_wh={list(small)}: expected data.input_wh="
                    f"{[width, height]} or a smaller size of the same aspect ratio"
                )
        return self


def shipped_configs() -> dict[str, Path]:
    """Name to path of every YAML in the package; those of ``configs/paper`` begin with paper/.

    Files whose names begin with an underscore are only extended by others.
    """
    folder = Path(str(resources.files("posefabric"))) / "configs"
    paths = [*sorted(folder.glob("*.yaml")), *sorted(folder.glob("paper/*.yaml"))]
    return {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for path in paths
        if not path.name.startswith("_")
    }


def load_config(name_or_path: str | None, overrides: Sequence[str] = ()) -> Config:
    """Defaults, then a shipped name or a YAML file, then ``section.option=value`` overrides.

    A file's ``extends: FILE``, beside it, is read before it. Raises PosefabricError that names
    the file or override, the option, and near names.
    """
    tree: dict[str, Any] = {}
    origin = "defaults"
    if name_or_path is not None:
        path = _find_yaml(name_or_path)
        origin = str(path)
        tree = _read_layers(path)
    for override in overrides:
        _apply_override(tree, override)
    if overrides:
        origin += " with the command line's options"
    return config_from_tree(tree, origin=origin)


def _read_layers(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The options of a file over those of the file it extends, over those of that one's ..."""
    if path in below:
        raise PosefabricError(
            f"{below[-1]}: extends: {path.name} extends this file; break the ring"
        )
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        where = f"{below[-1]}: extends: " if below else ""
        raise PosefabricError(f"{where}{path}: cannot be read as YAML: {error}") from error
    if loaded is not None and not isinstance(loaded, dict):
        raise PosefabricError(f"{path}: expected sections and options, got {type(loaded).__name__}")
    # A section whose options are all commented out is a section of defaults.
    tree = {
        key: {} if value is None and key in _sections() else value
        for key, value in (loaded or {}).items()
    }
    base = tree.pop("extends", None)
    if base is None:
        return tree
    return _merged(_read_layers(path.parent / str(base), (*below, path)), tree)


def _merged(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Sections option by option; an option's value, a mapping too, is replaced as a whole."""
    merged = dict(lower)
    for key, value in upper.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = {**merged[key], **value} if both else value
    return merged


def config_from_tree(tree: dict[str, Any], *, origin: str) -> Config:
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise PosefabricError(_explain(error, origin)) from error


def with_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """A copy of a configuration with dotted overrides applied."""
    tree = config.model_dump(mode="json")
    if any(override.startswith("augment.preset=") for override in overrides):
        # A run's configuration no longer tells which ranges were chosen and which filled in.
        tree["augment"] = {}
    for override in overrides:
        _apply_override(tree, override)
    return config_from_tree(tree, origin="overrides")


def check_trainable(config: Config, command: Literal["search", "train"]) -> None:
    """PosefabricError when a search is asked of a baseline, or plain training of a fabric."""
    network = config.model.network
    if command == "search" and network != "fabric":
        raise PosefabricError(
            f"model.network={network}: there is nothing to search in it; train it with "
            f"`posefabric train CONFIG --out RUN`, or set model.network=fabric"
        )
    if command == "train" and network == "fabric":
        raise PosefabricError(
            "model.network=fabric: its architecture is not known before a search; use "
            "`posefabric search`, then `derive`, or set model.network to a baseline (branchnet, "
            "simple_baseline, hrnet)"
        )


def _find_yaml(name_or_path: str) -> Path:
    shipped = shipped_configs()
    if name_or_path in shipped:
        return shipped[name_or_path]
    path = Path(name_or_path)
    if path.is_file():
        return path
    raise PosefabricError(
        f"{name_or_path}: no such configuration file or shipped name"
        f"{_did_you_mean(name_or_path, shipped)}; shipped: {', '.join(shipped)}"
    )


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise PosefabricError(f"{override!r}: an override reads section.option=value")
    node = tree
    pieces = key.split(".")
    for piece in pieces[:-1]:
        node = node.setdefault(piece, {})
        if not isinstance(node, dict):
            raise PosefabricError(f"{override!r}: {piece} is an option, not a section")
    try:
        node[pieces[-1]] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise PosefabricError(f"{override!r}: the value is not YAML: {error}") from error


def _explain(error: ValidationError, origin: str) -> str:
    lines = []
    for item in error.errors():
        where = ".".join(str(piece) for piece in item["loc"]) or "the options together"
        if item["type"] == "extra_forbidden":
            known = _options(item["loc"][:-1])
            hint = _did_you_mean(str(item["loc"][-1]), known)
            lines.append(f"{origin}: unknown option {where}{hint}; known here: {', '.join(known)}")
        else:
            lines.append(f"{origin}: {where}: {item['msg']}, got {item['input']!r}")
    return "\n".join(lines)


def _sections() -> list[str]:
    return [name for name, field in Config.model_fields.items() if field.default_factory]


def _options(location: Sequence[Any]) -> list[str]:
    model: Any = Config
    for piece in location:
        model = model.model_fields[piece].annotation
    return list(model.model_fields)


def _did_you_mean(word: str, known: Any) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]}?)" if near else ""
