"""Sums over all processes, as compiled code asks for them in the middle of its work."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_FUNCTION = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_double), ctypes.c_longlong
)


class Adder:
    """An ``int (void* context, double* values, long long count)`` that adds up in place.

    All processes call it equally often, with as many values. It returns 0, or something else where
    it failed; :meth:`problem` then says why.

    Args:
        function, context: addresses.
        owner: what they belong to, which lives as long as this object.
    """

    def __init__(
        self,
        function: int,
        context: int | None,
        problem: Callable[[], Exception],
        *,
        owner: object = None,
    ) -> None:
        self.function, self.context, self.problem = function, context, problem
        self._owner = owner

    @classmethod
    def calling(cls, add_up: Callable[[Tensor], Tensor]) -> Adder:
        """One that calls ``add_up``: float64 (n,), which it may write into, to its sums."""
        import torch

        raised: list[Exception] = []

        def call(context: int | None, values: ctypes._Pointer[ctypes.c_double], count: int) -> int:
            try:
                room = ctypes.cast(values, ctypes.POINTER(ctypes.c_double * count)).contents
                own = torch.frombuffer(room, dtype=torch.float64)
                own.copy_(add_up(own))
            except Exception as error:  # nothing can be raised through compiled code
                raised.append(error)
            return len(raised)

        function = _FUNCTION(call)
        return cls(address_of(function), None, lambda: raised[-1], owner=function)


def address_of(function: Any) -> int:
    """Of a function of a library, or one that compiled code may call."""
    found = ctypes.cast(function, ctypes.c_void_p).value
    assert found is not None
    return found
