"""Sums over all processes, as compiled code asks for them in the middle of its work."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_FUNCTION = ctypes.CFUNCTYPE(
    None,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_double),
    ctypes.c_longlong,
    ctypes.POINTER(ctypes.c_int),
)


class Adder:
    """A ``void (void* context, double* values, long long count, int* done)`` that adds up in place.

    All processes call it equally often, with as many values. It sets ``done``, which comes as 0,
    unless it fails; :meth:`problem` then says why, once.

    Args:
        function, context: addresses.
        owner: what they belong to, which lives as long as this object.
    """

    def __init__(
        self,
        function: int,
        context: int | None,
        problem: Callable[[], BaseException],
        *,
        owner: object = None,
    ) -> None:
        self.function, self.context, self.problem = function, context, problem
        self._owner = owner

    @classmethod
    def calling(cls, add_up: Callable[[Tensor], Tensor]) -> Adder:
        """One that calls ``add_up``: float64 (n,), which it may write into, to its sums."""
        import torch

        raised: list[BaseException] = []

        def call(context: int | None, values: Any, count: int, done: Any) -> None:
            try:
                room = ctypes.cast(values, ctypes.POINTER(ctypes.c_double * count)).contents
                own = torch.frombuffer(room, dtype=torch.float64)
                own.copy_(add_up(own))
                done[0] = 1
            except BaseException as error:  # Ctrl-C too: none passes through compiled code
                raised.append(error)

        def problem() -> BaseException:
            # What nobody could keep came before the first line: Ctrl-C.
            return raised.pop() if raised else KeyboardInterrupt()

        function = _FUNCTION(call)
        return cls(address_of(function), None, problem, owner=function)


def address_of(function: Any) -> int:
    """Of a function of a library, or one that compiled code may call."""
    found = ctypes.cast(function, ctypes.c_void_p).value
    assert found is not None
    return found
