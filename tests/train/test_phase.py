"""A whole phase: trained, saved, evaluated on disk; and its errors."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import pytest
import torch
from trainings import losses, make_config, people

from posefabric.data.crop import CropGeometry
from posefabric.data.pipeline import make_codec
from posefabric.evaluate.runner import predict_dataset
from posefabric.models.build import build_supernet, load_network
from posefabric.run import RunFolder
from posefabric.search.run_search import search
from posefabric.search.uniform import Uniform
from posefabric.space.architecture import Architecture
from posefabric.structures import DataError, PersonDataset, PosefabricError
from posefabric.train.checkpoint import read_weights
from posefabric.train.phase import evaluate, headline, train_phase


def test_a_phase_leaves_weights_architecture_and_evaluation(tmp_path: Path) -> None:
    config = make_config(
        search=dict(epochs=1.0, ema=0.5, evaluate_every=0.5),
        model=dict(parts=3),
        threads=torch.get_num_threads(),
    )
    run = RunFolder.create(tmp_path / "run", config=config, kind="search")
    network, result = search(run)
    assert run.state == "finished" and run.info["train_seconds"] > 0
    tensors, _ = read_weights(run.weights_path)
    for name, value in network.state_dict().items():
        assert torch.equal(tensors[name], value), name
    assert Architecture.load(run.architecture_path) == network.architecture()
    written = json.loads((run.path / "evaluation.json").read_text())
    assert written == json.loads(json.dumps(result))
    assert (written["train_steps"], written["skipped_steps"]) == (4, 0)
    assert written["persons"] == written["predicted"] == 8 and written["flip"] is True
    records = run.metrics()
    assert [r["step"] for r in records if "val_PCK" in r] == [2, 4]
    assert records[-1] == {"phase": "search", "step": 4, **val(result)}
    assert len(losses(run.path)) == 4

    loaded = load_network(run)
    again = evaluate(loaded, config, people(8, seed=1))
    assert again["preset"] == "hrnet" and again["input_wh"] == [64, 64]


def test_a_phase_with_held_out_persons_says_so(tmp_path: Path) -> None:
    """8 of 16 pictures for the weights: an epoch is 2 steps of 4 persons."""
    config = make_config(search=dict(strategy="second_order", epochs=1.0, log_every=1))
    run = RunFolder.create(tmp_path / "run", config=config, kind="search")
    network, result = search(run)
    assert (result["train_steps"], result["skipped_architecture_steps"]) == (2, 0)
    assert (result["train_persons"], result["held_out_persons"]) == (8, 8)
    assert all(p.abs().max() > 0 for p in network.arch_parameters().values())
    steps = [r for r in run.metrics() if "loss" in r]
    assert all(r["held_out_loss"] > 0 and r["architecture_gradient_norm"] > 0 for r in steps)
    assert all("alpha_entropy" in r for r in steps)
    with pytest.raises(PosefabricError, match=r"search\.architecture_share=0\.5.*two persons"):
        config = make_config(
            data=dict(synthetic_train=2), search=dict(strategy="first_order", batch_size=2)
        )
        search(RunFolder.create(tmp_path / "small", config=config, kind="search"))


def val(result: dict) -> dict[str, float]:
    return {f"val_{name}": value for name, value in headline(result).items()}


def test_evaluation_is_the_runners_under_the_configuration() -> None:
    config = make_config(data=dict(preset="udp"))
    network, dataset = build_supernet(config).eval(), people(8, seed=1)
    result = evaluate(network, config, dataset, flip=False, keep_predictions=True)
    expected = predict_dataset(
        network,
        dataset,
        geometry=CropGeometry(input_wh=(64, 64), preset="udp"),
        codec=make_codec(config.data),
        normalisation=network.normalisation,
        flip=False,
    )
    found = [x for row in result["predictions"] for x in row["keypoints"][:2]]
    assert found == pytest.approx(expected.keypoints[:, 0].flatten().tolist(), abs=1e-3)
    assert result["flip"] is False and result["preset"] == "udp"


def test_kept_predictions_follow_the_options() -> None:
    """Of persons that lie on one another the better one is kept, unless NMS is off."""
    dataset = people(8, seed=1)
    person = dataset.persons[0]
    twice = [dataclasses.replace(person, annotation_id=k) for k in (1, 2)]
    same = dataclasses.replace(dataset, persons=twice)
    network = build_supernet(make_config()).eval()

    def kept(**evaluation: object) -> list[dict]:
        config = make_config(evaluation=evaluation)
        return evaluate(network, config, same, keep_predictions=True)["predictions"]

    assert len(kept()) == 1 and len(kept(nms_threshold=None)) == 2
    (plain,), (raw,) = kept(), kept(rescore_threshold=None)
    assert raw["score"] == 1.0 != plain["score"], "the box's own score"
    (mirrored,) = kept(flip_test=False)
    assert mirrored["keypoints"] != plain["keypoints"]


def test_headlines() -> None:
    result = {"pck": {"PCK": 0.51234567, "limbs": 0.25}, "oks": {"AP": None}}
    assert headline(result) == {"PCK": 0.512346, "PCK_limbs": 0.25}
    assert headline({"pck": {"PCK": 1, "limbs": None}, "oks": {"AP": 0.5}}) == {"PCK": 1, "AP": 0.5}
    assert headline({"pck": None, "oks": None}) == {}


def test_a_network_of_another_loss_is_refused_before_training(tmp_path: Path) -> None:
    config = make_config()
    run = RunFolder.create(tmp_path / "run", config=config, kind="search")
    optim = config.search.model_copy(update={"loss": "mse"})
    with pytest.raises(
        PosefabricError, match=r"search\.loss=mse: .*made for cross_entropy.*logits"
    ):
        train_phase(
            build_supernet(config), run=run, optim=optim, strategy=Uniform(), phase="search"
        )
    squared = make_config(search=dict(loss="mse"))
    with pytest.raises(PosefabricError, match=r"finetune\.loss=cross_entropy: .*made for mse"):
        train_phase(
            build_supernet(squared),
            run=run,
            optim=config.finetune,
            strategy=Uniform(),
            phase="finetune",
        )
    assert not run.metrics_path.exists()


def test_unreadable_training_pictures_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = people()

    def read(person):
        if person.image_id == 3:
            raise DataError(f"{person.file}: cut short")
        return good.read_image(person)

    dataset = PersonDataset(
        name="one bad", skeleton=good.skeleton, persons=good.persons, read_image=read
    )
    config = make_config(data=dict(on_bad_image="skip"), search=dict(epochs=1.0))
    run = RunFolder.create(tmp_path / "run", config=config, kind="search")
    with caplog.at_level(logging.WARNING):
        result = train_phase(
            build_supernet(config),
            run=run,
            optim=config.search,
            strategy=Uniform(),
            phase="search",
            dataset=dataset,
            validation=people(4, seed=1),
        )
    assert result["unreadable_train_files"] == 1 and result["persons"] == 4
    assert "1 unreadable training pictures were skipped" in caplog.text
