"""Packed persons are the persons, to the last bit."""

from __future__ import annotations

import dataclasses

import numpy as np

from posefabric.data.packed import PackedPersons
from posefabric.structures import Person


def test_every_person_comes_back() -> None:
    persons = [
        Person(
            image_id=2**40 + row,
            annotation_id=row - 1,
            file="" if row == 1 else f"folder/ä {row}\udcff.jpg",
            box_xywh=np.arange(4, dtype=np.float32) + row / 3,
            keypoints=np.full((3, 2), row / 7, np.float32),
            visibility=np.array([0, 1, 2], np.uint8),
            score=1 / (row + 3),
            area=1e6 / 7,
            is_crowd=row == 2,
        )
        for row in range(4)
    ]
    packed = PackedPersons(persons)
    assert len(packed) == 4
    for row, person in enumerate(persons):
        found = packed[row]
        for field in dataclasses.fields(Person):
            one, two = getattr(person, field.name), getattr(found, field.name)
            assert type(one) is type(two), field.name
            np.testing.assert_array_equal(one, two)
