"""Several processes evaluate every person exactly once, as one process does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import in_ranks
from test_runner import _Conv, _parts, _people

from posefabric.evaluate.runner import evaluate_network, predict_dataset


@pytest.mark.parametrize(("persons", "ranks"), [(7, 2), (2, 3)])
def test_every_person_is_predicted_once_and_in_order(
    persons: int, ranks: int, tmp_path: Path
) -> None:
    dataset, network = _people(persons), _Conv()

    def work(rank: int) -> tuple[Any, int]:
        predictions = predict_dataset(network, dataset, **_parts())
        return predictions, len(network.seen)

    expected = predict_dataset(_Conv(), dataset, **_parts())
    found = in_ranks(work, tmp_path, ranks=ranks)
    for predictions, _ in found:
        assert predictions.index.tolist() == list(range(persons))
        np.testing.assert_allclose(predictions.keypoints, expected.keypoints, rtol=1e-5)
        np.testing.assert_allclose(predictions.scores, expected.scores, rtol=1e-5)
    # A flip test runs the network twice a batch; a rank without persons never does.
    assert [batches for _, batches in found] == ([2, 2] if ranks == 2 else [0, 2, 2])


def test_the_result_is_that_of_one_process(tmp_path: Path) -> None:
    dataset = _people(9, spoiled=(3,))

    def measure(rank: int) -> str:
        result = evaluate_network(_Conv(), dataset, on_bad_image="skip", **_parts())
        return json.dumps(result, default=str, sort_keys=True)

    found = in_ranks(measure, tmp_path)
    assert found[0] == found[1] == measure(0)
    assert json.loads(found[0])["predicted"] == 7
    assert list(json.loads(found[0])["unreadable"]) == ["picture 3"]


def test_a_bad_picture_of_one_rank_is_told_by_all(tmp_path: Path) -> None:
    dataset = _people(8, spoiled=(3,))
    found = in_ranks(lambda rank: predict_dataset(_Conv(), dataset, **_parts()), tmp_path)
    assert found == ["picture 3: truncated"] * 2
