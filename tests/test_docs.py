"""What the documents say exists: options, commands, files, links; what is generated is current."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from posefabric.config import Config, config_from_tree, shipped_configs
from posefabric.skeletons import skeleton_from_tree
from posefabric.study.plan import StudyFile

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    document: Path
    language: str
    text: str


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(language: str) -> list[Block]:
    found = [
        Block(path, *match.groups())
        for path in DOCUMENTS
        for match in FENCE.finditer(path.read_text(encoding="utf-8"))
    ]
    return [block for block in found if block.language == language]


def prose(path: Path) -> str:
    return FENCE.sub("", path.read_text(encoding="utf-8"))


def shell_commands() -> Iterator[tuple[str, list[str]]]:
    """(document, words) of every posefabric command in a bash block."""
    for block in blocks("bash"):
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            while words and "=" in words[0]:
                words = words[1:]
            if words and Path(words[0]).name == "posefabric":
                yield name_of(block.document), words[1:]


def inline_commands() -> Iterator[tuple[str, list[str]]]:
    """(document, words) of every posefabric command in running text; it may be cut short."""
    for path in DOCUMENTS:
        for text in INLINE.findall(prose(path)):
            if text.startswith("posefabric ") and "/" not in text.split()[1]:
                yield name_of(path), text.split()[1:]


def load(script: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(script, ROOT / "docs" / f"{script}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def app() -> Any:
    return pytest.importorskip("posefabric.cli").app


def test_every_option_is_described_and_the_file_is_current():
    script = load("build_configuration")
    assert script.undescribed() == []
    current = script.PATH.read_text(encoding="utf-8")
    assert current == script.document(), "the options have changed: run `make docs`"


def test_a_changed_default_changes_the_file(monkeypatch):
    script = load("build_configuration")
    monkeypatch.setattr(script.OptimConfig.model_fields["epochs"], "default", 17.0)
    assert "| `epochs` | number > 0 | `17` |" in script.document()


def test_readme_lists_the_files_there_are():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert load("build_tree").updated(readme) == readme, "files have changed: run `make docs`"


def test_documents_quote_commands():
    assert len(list(shell_commands())) > 15 and len(list(inline_commands())) > 10


@pytest.mark.parametrize(("document", "words"), shell_commands())
def test_a_quoted_shell_command_parses(app, document, words):
    from cyclopts import CycloptsError

    try:
        handler, bound, *_ = app.parse_args(words, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        pytest.fail(f"{document}: posefabric {' '.join(words)}: {error}")
    config = bound.arguments.get("config")
    if handler.__name__ == "search" and config is not None and "=" not in config:
        assert config in shipped_configs() or config.endswith(".yaml"), document


def test_a_command_in_the_text_names_what_exists(app):
    for document, words in inline_commands():
        said = f"{document}: `posefabric {' '.join(words)}`"
        node, rest = app, list(words)
        while rest and rest[0][0].islower() and subcommands(node):
            choices = rest.pop(0).split("|")
            known = subcommands(node)
            assert set(choices) <= known, f"{said}: there are {sorted(known)}"
            node = node[choices[0]]
        collected = node.assemble_argument_collection() if node.default_command else []
        known = {"--help", "--version", *(name for item in collected for name in item.names)}
        for word in rest:
            option = word.strip("[]").partition("=")[0]
            assert not option.startswith("--") or option in known, f"{said}: no {option}"


def subcommands(node: Any) -> set[str]:
    return {name for name in node if not name.startswith("-")}


def test_overrides_in_the_documents_name_options():
    pattern = re.compile(r"(?<![\w./-])((?:[a-z]+\.)[a-z_]+)=")
    sections = set(Config.model_fields)
    found = 0
    for path in DOCUMENTS:
        for key in pattern.findall(path.read_text(encoding="utf-8")):
            section, _, option = key.partition(".")
            if section in sections:
                found += 1
                model = Config.model_fields[section].annotation
                assert isinstance(model, type) and issubclass(model, BaseModel)
                assert option in model.model_fields, f"{name_of(path)}: no option {key}"
    assert found > 15


@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda b: f"{b.document.stem}-{len(b.text)}")
def test_yaml_in_the_documents_loads(block):
    tree = yaml.safe_load(block.text)
    if "keypoints" in tree:
        skeleton = skeleton_from_tree(tree, origin=block.document.name)
        assert skeleton.num_keypoints > 1 and len(skeleton.groupings) >= 1
    elif "arms" in tree:
        assert StudyFile.model_validate(tree).variants()
    else:
        config_from_tree(tree, origin=block.document.name)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(path):
    for target in LINK.findall(prose(path)):
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), f"{name_of(path)}: {target}"
        assert linked.is_relative_to(ROOT), f"{name_of(path)}: {target} leaves the repository"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", prose(linked), re.MULTILINE)
            assert anchor in map(slug, headings), f"{name_of(path)}: no heading for {target}"


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def test_make_targets_in_the_documents_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    for path in DOCUMENTS:
        for text in [*INLINE.findall(prose(path)), *shell_lines(path)]:
            words = text.split()
            for i, word in enumerate(words[:-1]):
                if word == "make" and re.fullmatch("[a-z]+", words[i + 1]):
                    assert words[i + 1] in targets, f"{name_of(path)}: {text}"


def shell_lines(path: Path) -> list[str]:
    return [
        line.partition("#")[0]
        for block in blocks("bash")
        if block.document == path
        for line in block.text.splitlines()
    ]


def test_every_page_is_in_the_map():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"]({page.name})" in index, page.name
