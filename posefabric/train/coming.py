"""An iterator whose next items can be looked at before their turn."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Coming(Iterator[T], Generic[T]):
    """The items of another iterator, each once and in order, however often they were looked at."""

    def __init__(self, items: Iterator[T]) -> None:
        self._items = items
        self._seen: deque[T] = deque()

    def __next__(self) -> T:
        return self._seen.popleft() if self._seen else next(self._items)

    def peek(self, count: int) -> list[T]:
        """The next ``count`` items, or as many as there are."""
        missing = max(0, count - len(self._seen))
        self._seen.extend(itertools.islice(self._items, missing))
        return list(itertools.islice(self._seen, count))
