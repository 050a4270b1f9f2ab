"""The compiled path equals the plain one, and compiles once for each kind of cell."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from networks import make_supernet, noise
from test_grouped import assert_equal_path
from torch._dynamo.utils import counters
from trainings import make_config

from posefabric.models import compiled
from posefabric.models.compiled import CompiledCell, compiled_path
from posefabric.models.kernels import Kernels, load_kernels
from posefabric.models.supernet import Supernet
from posefabric.search.closing import all_choices
from posefabric.structures import PosefabricError
from posefabric.train.phase import choose_path

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(
    load_kernels().library is None, reason=f"no compiler: {load_kernels().reason}"
)


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of torch.compile but the making of machine code, which takes a minute."""
    whole = torch.compile

    def without_machine_code(run: Any, *, options: dict[str, Any], **others: Any) -> Any:
        guards = {name: options[name] for name in options if name == "guard_filter_fn"}
        return whole(run, backend="aot_eager", options=guards, **others)

    monkeypatch.setattr(torch, "compile", without_machine_code)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def step(network: Supernet) -> None:
    network.train()(noise(2, 3, 64, 64)).sum().backward()


@pytest.mark.parametrize("shape", [dict(hidden_nodes=2, shared_alpha=False), dict(faithful=True)])
def test_it_equals_the_plain_path(shape: dict, traced: None) -> None:
    network = make_supernet(**shape)
    assert_equal_path(network, noise(2, 3, 64, 64), lambda n: compiled_path(n, CPU))


@pytest.mark.slow
def test_machine_code_equals_the_plain_path() -> None:
    """The last cell alone: a minute's work otherwise."""
    network = make_supernet(first_layer=5, parts={"all": (0, 1, 2, 3)})
    assert_equal_path(network, noise(2, 3, 64, 64), lambda n: compiled_path(n, CPU))
    assert graphs() >= 1


def test_parts_share_what_is_compiled_and_nothing_is_compiled_again(traced: None) -> None:
    one = make_supernet(parts={"all": (0, 1, 2, 3)}).double()
    two = make_supernet().double()
    assert len(two.graph.parts) == 2
    step(compiled_path(one, CPU))  # type: ignore[arg-type]
    kinds = graphs()
    scales = {cell.scale for cell in one.graph.parts[0].cells if cell.edges}
    assert kinds == len(scales) < len(one.graph.parts[0].cells)
    torch.compiler.reset()
    counters.clear()
    compiled_path(two, CPU)
    step(two)
    assert graphs() == kinds
    for choice in all_choices(two)[:2]:
        choice.close(two, choice.open_options(two)[-1])
    step(two)
    two.eval()
    with torch.no_grad():
        two(noise(1, 3, 64, 64))
    step(two)
    assert graphs() == kinds


def test_evaluation_is_the_plain_one(traced: None) -> None:
    network = make_supernet().double().eval()
    images = noise(2, 3, 64, 64)
    with torch.no_grad():
        expected = network(images)
        other = compiled_path(copy.deepcopy(network), CPU)
        assert torch.equal(other(images), expected)
    assert any(isinstance(module, CompiledCell) for module in other.modules())
    assert graphs() == 0


def test_names_and_state_stay() -> None:
    network = make_supernet()
    before = list(network.state_dict())
    compiled_path(network, CPU)
    assert list(network.state_dict()) == before


@pytest.mark.parametrize(("path", "compiles"), [("compiled", True), ("fast", False)])
def test_the_option_chooses_it(path: str, compiles: bool) -> None:
    network = make_supernet()
    choose_path(network, make_config(model=dict(path=path)), CPU)
    assert compiles == any(isinstance(module, CompiledCell) for module in network.modules())


def test_torch_before_2_8_asks_the_template_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "compile", lambda run, **options: given.append(options) or run)
    monkeypatch.delattr(torch.compiler, "skip_guard_on_all_nn_modules_unsafe")
    compiled_path(make_supernet(), CPU)
    assert given and all(options["options"] == {} for options in given)


def test_without_a_compiler_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "load_kernels", lambda: Kernels(None, "no C++ compiler"))
    with pytest.raises(PosefabricError, match=r"model\.path=compiled: no C\+\+ compiler.*plain"):
        compiled_path(make_supernet(), CPU)
