"""Defaults, YAML, overrides, and what each mistake is answered with."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from posefabric.config import (
    Config,
    config_from_tree,
    load_config,
    shipped_configs,
    with_overrides,
)
from posefabric.structures import PosefabricError


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return str(path)


def test_defaults_then_file_then_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "name: mine\nsearch:\n  epochs: 7\n  batch_size: 16\n")
    config = load_config(path, ["search.epochs=2.5", "model.parts=5", "data.input_wh=[64,96]"])
    assert (config.name, config.search.epochs, config.search.batch_size) == ("mine", 2.5, 16)
    assert config.model.parts == 5 and config.data.input_wh == (64, 96)
    assert config.finetune == Config().finetune
    assert load_config(None) == Config()


@pytest.mark.parametrize("text", ["", "# nothing\n", "search:\n  # epochs: 3\nmodel:\n"])
def test_files_and_sections_of_comments_are_defaults(text: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    assert load_config(path) == Config()
    assert load_config(path, ["search.epochs=4"]).search.epochs == 4


def test_shipped_names_win_over_paths() -> None:
    for name, path in shipped_configs().items():
        assert load_config(name) == load_config(str(path))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("search.learning_rate=1e-3", 1e-3),
        ("search.learning_rate=2", 2.0),
        ("model.parts=random", "random"),
        ("model.parts=random:12", "random:12"),
        ("model.parts='5'", 5),
        ("data.cache=false", False),
        ("data.root=/some/where=else", "/some/where=else"),
        ("data.root=null", None),
        ("data.root=", None),
        ("model.operations=[skip, zero]", ("skip", "zero")),
        ("threads=3", 3),
    ],
)
def test_override_values(text: str, value: object) -> None:
    node: object = load_config(None, [text])
    for piece in text.partition("=")[0].split("."):
        node = getattr(node, piece)
    assert node == value and type(node) is type(value)


@pytest.mark.parametrize("value", ["random:0", "randon", "random:2.5", "head"])
def test_parts_that_are_none(value: str) -> None:
    with pytest.raises(PosefabricError, match=rf"model\.parts.*random:5.*got '{value}'"):
        load_config(None, [f"model.parts={value}"])


def test_later_overrides_win_and_the_first_configuration_rests() -> None:
    first = Config()
    second = with_overrides(first, ["seed=1", "seed=2", "search.ema=0.5"])
    assert second.seed == 2 and second.search.ema == 0.5
    assert first == Config() and with_overrides(second, []) == second


@given(
    seed=st.integers(0, 2**32 - 1),
    epochs=st.floats(0.01, 1e3),
    root=st.none() | st.text(st.characters(blacklist_categories=("Cs", "Cc")), max_size=9),
)
@settings(max_examples=30, deadline=None)
def test_a_resolved_configuration_survives_yaml(seed: int, epochs: float, root: str | None) -> None:
    config = config_from_tree(
        {"seed": seed, "search": {"epochs": epochs}, "data": {"root": root}}, origin="t"
    )
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    assert config_from_tree(yaml.safe_load(text), origin="t") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("search.epoch=3", r"unknown option search\.epoch \(did you mean epochs\?\); known here: "),
        ("serch.epochs=3", r"unknown option serch \(did you mean search\?\); known here: name"),
        ("zzz=1", r"unknown option zzz; known here: name, seed"),
        ("search.epochs=many", r"search\.epochs: .*valid number.*got 'many'"),
        ("search.epochs=0", r"search\.epochs: .*greater than 0, got 0"),
        ("search.batch_size=2.5", r"search\.batch_size: .*integer"),
        ("search.loss=l1", r"search\.loss: .*'cross_entropy' or 'mse', got 'l1'"),
        ("data.input_wh=[100,96]", r"data\.input_wh: .*multiples of 32, got \(100, 96\)"),
        ("data.input_wh=[0,32]", r"data\.input_wh: .*multiples of 32"),
        ("data.input_wh=64", r"data\.input_wh: .*tuple"),
        ("model.parts=half", r"model\.parts"),
        ("seed=4294967296", r"seed: .*less than 4294967296"),
        ("search=3", r"search: .*got 3"),
        ("search.epochs.x=3", r"unknown option search\.epochs\.x|search\.epochs: "),
        ("name.x=3", r"name: "),
        ("epochs", r"'epochs': an override reads section\.option=value"),
        ("=3", r"'=3': an override reads section\.option=value"),
        ("seed=[1", r"'seed=\[1': the value is not YAML"),
    ],
)
def test_wrong_overrides_are_explained(override: str, message: str) -> None:
    with pytest.raises(PosefabricError, match=message):
        load_config(None, [override])


def test_an_option_is_not_a_section(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 3\n")
    with pytest.raises(PosefabricError, match=r"'seed\.x=1': seed is an option, not a section"):
        load_config(path, ["seed.x=1"])
    with pytest.raises(PosefabricError, match=r"epochs is an option, not a section"):
        with_overrides(Config(), ["search.epochs.x=1"])


def test_every_mistake_of_a_file_is_told_with_its_name(tmp_path: Path) -> None:
    path = write(tmp_path, "search:\n  epochs: -1\n  zzz: red\nseed: x\n")
    with pytest.raises(PosefabricError) as caught:
        load_config(path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3 and all(line.startswith(f"{path}: ") for line in lines)
    assert {line.split(": ")[1].split(";")[0] for line in lines} == {
        "search.epochs",
        "unknown option search.zzz",
        "seed",
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1", "cannot be read as YAML"),
        (b"- 1\n- 2\n", "expected sections and options, got list"),
        (b"\xff\xfe\x00\x01", "cannot be read as YAML"),
        (b"a: !!python/object/apply:os.system [true]\n", "cannot be read as YAML"),
        (b"1: 2\n", "1: .*strings"),
    ],
)
def test_files_that_are_no_configuration(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(PosefabricError, match=rf"mine\.yaml: .*{message}"):
        load_config(str(path))


def test_a_missing_file_names_near_ones() -> None:
    shipped = shipped_configs()
    with pytest.raises(
        PosefabricError, match=r"zz/zz\.yaml: no such configuration file or shipped"
    ):
        load_config("zz/zz.yaml")
    for name in shipped:
        with pytest.raises(PosefabricError, match=rf"\(did you mean .*shipped: .*{name}"):
            load_config(name + "x")


def test_a_file_can_extend_another(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("data: {workers: 3, cache: false}\nseed: 5\n")
    (tmp_path / "mine.yaml").write_text("extends: base.yaml\ndata:\n  workers: 2\n")
    config = load_config(str(tmp_path / "mine.yaml"), ["seed=6"])
    assert (config.data.workers, config.data.cache, config.seed) == (2, False, 6)


def test_extending_a_missing_file_or_oneself_is_told(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: gone.yaml\n")
    with pytest.raises(PosefabricError, match=r"mine\.yaml: extends: .*gone\.yaml: cannot be read"):
        load_config(str(mine))
    mine.write_text("extends: mine.yaml\n")
    with pytest.raises(PosefabricError, match="break the ring"):
        load_config(str(mine))


@pytest.mark.parametrize("given", ["[160,160]", "[64,96]", "[100,100]"])
def test_progressive_resizing_shrinks_the_whole_input(given: str) -> None:
    with pytest.raises(PosefabricError, match="small_input_wh"):
        load_config("demo", ["data.input_wh=[128,128]", f"finetune.small_input_wh={given}"])
    config = load_config("demo", ["data.input_wh=[128,128]", "finetune.small_input_wh=[96,96]"])
    assert config.finetune.small_input_wh == (96, 96)
