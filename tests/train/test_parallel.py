"""Two processes with half the batch each train as one process does, and resume each other."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import make_supernet
from ranks import in_ranks
from torch import Tensor
from trainings import CASES, STEPS, losses, make_config, make_trainer, people

from posefabric import distributed
from posefabric.distributed import from_first, place, share
from posefabric.models.fast_convolutions import Fast
from posefabric.models.grouped import fast_path, plain_path
from posefabric.run import RunFolder
from posefabric.structures import DataError, PersonDataset, PoseBatch
from posefabric.train import synchronised
from posefabric.train.gradients import add_gradients
from posefabric.train.loop import TrainingStopped
from posefabric.train.parallel import Parallel


def calm(case: str) -> Any:
    """A case whose rates do not magnify rounding.

    At the usual rate, Adam makes as much of the order of a batch's persons in one process: 6e-5
    of the loss after 10 steps. That the processes' sums are right to the last bits is told by
    test_gradients_are_those_of_the_whole_batch.
    """
    search = dict(learning_rate=1e-4, architecture_learning_rate=1e-3)
    chosen = dict(CASES[case])
    return make_config(**{**chosen, "search": {**chosen.get("search", {}), **search}})


def train(folder: Path, config: Any, *, writes: bool = True, until: int | None = None) -> dict:
    """Train in a folder; the network's state at the end, or at a stop before step ``until``."""
    trainer = make_trainer(folder, config, writes=writes)
    if until is not None:
        stop_at(trainer, until)
    with contextlib.suppress(TrainingStopped):
        trainer.fit()
    return {name: value.clone() for name, value in trainer.network.state_dict().items()}


def stop_at(trainer: Any, step: int) -> None:
    """As a signal that reaches rank 1 alone would, or the only process."""
    schedule = trainer.strategy.schedule

    def stopping(network: Any, progress: float) -> None:
        schedule(network, progress)
        if trainer.step == step - 1 and int(os.environ.get("RANK", "1")) == 1:
            signal.raise_signal(signal.SIGTERM)

    trainer.strategy.schedule = stopping


def in_two(folder: Path, config: Any, *, until: int | None = None) -> list[dict[str, Tensor]]:
    """The same in two processes; rank 0 makes the run."""

    def work(rank: int) -> dict[str, Tensor]:
        from_first(
            lambda: str(RunFolder.create(folder, config=config, kind="search", exist_ok=True).path)
        )
        return train(folder, config, writes=rank == 0, until=until)

    found = in_ranks(work, folder.parent / "ranks")
    assert all(isinstance(state, dict) for state in found), found
    return found


def assert_same_training(found: Path, expected: Path, *, tolerance: float = 1e-5) -> None:
    one, two = losses(expected), losses(found)
    assert [step for step, _ in two] == [step for step, _ in one] == list(range(1, STEPS + 1))
    np.testing.assert_allclose([v for _, v in two], [v for _, v in one], rtol=tolerance)


def assert_ranks_equal(states: list[dict[str, Tensor]]) -> None:
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    config = calm("plain")
    expected = train(tmp_path / "one", config)
    states = in_two(tmp_path / "two" / "run", config)
    assert_same_training(tmp_path / "two" / "run", tmp_path / "one")
    assert_ranks_equal(states)
    moved = [name for name in expected if name.startswith(("alphas", "betas"))]
    assert moved
    for name in moved:
        assert expected[name].abs().max() > 1e-3
        torch.testing.assert_close(states[0][name], expected[name], rtol=0, atol=2e-4)
    # Rank 0 alone writes: every step is there once, and nothing of another process.
    run = RunFolder.open(tmp_path / "two" / "run")
    assert len(run.metrics()) == STEPS
    assert not [p for p in run.path.rglob("*") if p.name.endswith(".tmp")]


@pytest.mark.parametrize("path", ["plain", "fast", "fast by gloo"])
@pytest.mark.parametrize("lower", [(1, 2, 3), (1, 3)], ids=["at_once", "by_parts"])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_gradients_are_those_of_the_whole_batch(
    loss: str,
    lower: tuple[int, ...],
    path: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In float64, of every weight, alpha and beta; 3 persons are 1 and 2, unevenly annotated."""
    parts = {"upper": (0, 2), "lower": lower}
    network = make_supernet(relaxation="sparsemax", parts=parts).double().train()
    if path != "plain":
        fast_path(network)
    if path == "fast by gloo":
        monkeypatch.setattr(distributed.ranks, "open_together", lambda launch, gather: None)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 3, 64, 64, generator=generator).double()
    targets = torch.rand(3, 4, 16, 16, generator=generator).double()
    weights = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0.5]]).double()

    def gradients(rank: int) -> tuple[Tensor, dict[str, Tensor | None]]:
        rows = share(3, place())
        parallel = Parallel(network, sync_norms=True, seed=0)
        with parallel.step(0):
            batch = PoseBatch(
                images=images[rows],
                heatmaps=targets[rows],
                weights=weights[rows],
                input_to_image=torch.eye(2, 3).expand(len(images[rows]), 2, 3),
                index=torch.arange(3)[rows],
            )
            value = add_gradients(
                network, batch, loss=loss, autocast=contextlib.nullcontext, scale=lambda x: x
            )
            parallel.penalty(sum(network.indecision())).backward()  # type: ignore[arg-type]
            value = parallel.gather(value)
        statistics = {n: b for n, b in network.named_buffers() if "running" in n}
        return value, {n: p.grad for n, p in network.named_parameters()} | statistics

    ranks = in_ranks(gradients, tmp_path)
    value, expected = gradients(0)
    for own, found in ranks:
        torch.testing.assert_close(own, value, rtol=1e-12 if path == "plain" else 1e-11, atol=0)
        for name, gradient in expected.items():
            if gradient is None:
                assert found[name] is None, name
                continue
            scale = float(gradient.abs().max()) + 1e-6
            assert float((found[name] - gradient).abs().max()) < 1e-10 * scale + 1e-14, name


def test_norms_stay_on_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a fast network that are not torch's in one process, in two are not either."""
    network = fast_path(make_supernet(parts={"all": (0, 1, 2, 3)})).train()
    images = torch.randn(2, 3, 64, 64)

    def torchs_norms(sync_norms: bool) -> int:
        seen: list[int] = []
        torchs = torch.nn.functional.batch_norm

        def norm(*args: Any, **options: Any) -> Tensor:
            seen.append(1)
            return torchs(*args, **options)

        with monkeypatch.context() as patched:
            patched.setattr(synchronised, "_batch_norm", norm)
            patched.setattr(torch.nn.functional, "batch_norm", norm)
            parallel = Parallel(network, sync_norms=sync_norms, seed=0)
            parallel.start()
            with parallel.step(0):
                network(images).sum().backward()
        return len(seen)

    norms = sum(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())
    for sync_norms in (True, False):
        found = in_ranks(lambda rank, s=sync_norms: torchs_norms(s), tmp_path / str(sync_norms))
        assert found == [torchs_norms(True)] * 2 and found[0] < norms / 2


def test_a_rank_without_kernels_takes_them_from_all(tmp_path: Path) -> None:
    """Where nothing could be compiled; norms would otherwise wait for sums of other sizes."""
    network = fast_path(make_supernet(parts={"all": (0, 1, 2, 3)})).train()
    images = torch.randn(2, 3, 64, 64)

    def work(rank: int) -> int:
        if rank == 1:
            plain_path(network)
        parallel = Parallel(network, sync_norms=True, seed=0)
        parallel.start()
        with parallel.step(0):
            network(images).sum().backward()
        return sum(isinstance(module, Fast) for module in network.modules())

    assert sum(isinstance(module, Fast) for module in network.modules()) > 10
    assert in_ranks(work, tmp_path) == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["averaged", "sparsemax", "random", "first_order", "second_order"])
def test_every_strategy_trains_as_in_one_process(case: str, tmp_path: Path) -> None:
    config = calm(case)
    train(tmp_path / "one", config)
    assert_ranks_equal(in_two(tmp_path / "two" / "run", config))
    assert_same_training(tmp_path / "two" / "run", tmp_path / "one")
    key = "held_out_loss"
    one, two = (
        [r[key] for r in RunFolder.open(tmp_path / name).metrics() if key in r]
        for name in ("one", "two/run")
    )
    assert bool(one) == ("order" in case)
    np.testing.assert_allclose(two, one, rtol=1e-5)


def test_unequal_shares_and_norms_of_their_own(tmp_path: Path) -> None:
    """Batches of 5 persons are 2 and 3; with norms not synchronised ranks still agree."""
    config = make_config(sync_norms=False, search=dict(batch_size=5, epochs=1.0))
    states = in_two(tmp_path / "two" / "run", config)
    assert_ranks_equal(states)
    train(tmp_path / "one", config)
    apart = [
        abs(a - b)
        for (_, a), (_, b) in zip(
            losses(tmp_path / "one"), losses(tmp_path / "two" / "run"), strict=True
        )
    ]
    assert 1e-6 < max(apart) < 1e-2, "norms of half a batch differ, but not by much"


@pytest.mark.slow
@pytest.mark.parametrize("first", ["one", "two"])
def test_resuming_with_another_number_of_processes(first: str, tmp_path: Path) -> None:
    config = calm("averaged")
    train(tmp_path / "whole", config)
    folder = tmp_path / "parts" / "run"
    (train if first == "one" else in_two)(folder, config, until=5)
    run = RunFolder.open(folder)
    assert run.state == "stopped" and losses(folder)[-1][0] == 5
    (in_two if first == "one" else train)(folder, config)
    assert_same_training(folder, tmp_path / "whole")


def test_a_bad_picture_of_one_rank_ends_both_after_a_checkpoint(tmp_path: Path) -> None:
    whole = people()
    config = make_config(**CASES["plain"])
    bad = make_trainer(tmp_path / "order", config).data.loader.order(0)[6]  # rank 1, second batch

    def read(person: Any) -> np.ndarray:
        if person.image_id == whole.persons[bad].image_id:
            raise DataError(f"{person.file}: torn")
        return whole.read_image(person)

    torn = PersonDataset(whole.name, whole.skeleton, whole.persons, read)
    folder = tmp_path / "run"

    def work(rank: int) -> None:
        make_trainer(folder, config, dataset=torn, writes=rank == 0).fit()

    RunFolder.create(folder, config=config, kind="search")
    found = in_ranks(work, tmp_path / "ranks")
    assert found[0] == found[1] and found[0].endswith(": torn")
    assert losses(folder)[-1][0] == 1
    assert (folder / "checkpoints" / "index.json").exists()
