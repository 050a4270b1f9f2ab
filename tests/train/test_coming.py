"""Items that are looked at before their turn come once and in order all the same."""

from __future__ import annotations

from posefabric.train.coming import Coming


def test_what_was_looked_at_still_comes() -> None:
    coming = Coming(iter(range(6)))
    assert next(coming) == 0
    assert coming.peek(2) == [1, 2]
    assert coming.peek(3) == [1, 2, 3]
    assert coming.peek(0) == []
    assert list(coming) == [1, 2, 3, 4, 5]


def test_the_end_is_the_others_end() -> None:
    read = []

    def items():
        for item in range(3):
            read.append(item)
            yield item

    coming = Coming(items())
    assert coming.peek(9) == [0, 1, 2]
    assert list(coming) == [0, 1, 2] and list(coming) == []
    assert read == [0, 1, 2], "each is read once"


def test_nothing_is_read_before_it_is_wanted() -> None:
    def items():
        yield 1
        raise RuntimeError("the second cannot be read")

    coming = Coming(items())
    assert coming.peek(1) == [1]
    assert next(coming) == 1
