"""Sums over the processes of one machine, through memory that they share.

A synchronised batch norm adds up a few numbers and waits for them, some hundred times a step:
through the system's network, as gloo does it, this may take longer than all the rest.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import logging
import mmap
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posefabric.distributed.launch import TIMEOUT, Launch
from posefabric.native import compile_library
from posefabric.structures import PosefabricError

if TYPE_CHECKING:
    from torch import Tensor

SOURCE = Path(__file__).with_name("shared_sums.cpp")
ROOM = 1 << 20  # bytes of a rank's array; what is larger comes in pieces
ERRORS = (OSError, ValueError, AttributeError, RuntimeError, PosefabricError)
DONE, UNEQUAL = -1, -2
LOOK_S = 0.25  # between looks at whether a rank that is waited for still lives


_log = logging.getLogger(__name__)


class SharedSums:
    """The memory of all ranks, which have to call :meth:`add` equally often.

    A rank holds a lock on its byte of the file, which the system takes back when it ends, however
    it ends. Raises one of ``ERRORS`` where the file cannot be mapped; it is closed then.

    Args:
        file: a descriptor of the memory, from now on this object's; another one of the same file
            must not be closed in this process, which would take back the lock.
    """

    def __init__(self, file: int, launch: Launch) -> None:
        self._file = file
        self._rank, self._ranks, self._step = launch.rank, launch.ranks, 0
        try:
            self._library = _load()
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, self._rank)
            self._memory = mmap.mmap(file, self._library.bytes(self._ranks, ROOM))
        except ERRORS:
            os.close(file)
            raise
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._place = (address, self._ranks, ROOM)

    def add(self, own: Tensor) -> Tensor:
        """The sum over all ranks of float32 or float64 (n,); the same bits on each.

        Raises RuntimeError, as torch's own collectives, when a rank has ended or stays away.
        """
        own = own.contiguous()
        total, size = own.new_empty(own.shape), own.element_size()
        given, taken, left = own.data_ptr(), total.data_ptr(), own.numel() * size
        while left:
            piece = min(left, ROOM)
            self._step += 1
            self._library.give(*self._place, self._rank, self._step, given, piece, size == 8)
            self._take(taken, piece, size == 8)
            given, taken, left = given + piece, taken + piece, left - piece
        return total

    def _take(self, into: int, size: int, is_double: bool) -> None:
        arguments = (*self._place, self._rank, self._step, into, size, is_double, LOOK_S)
        ended, until = [], time.monotonic() + TIMEOUT.total_seconds()
        while (found := self._library.take(*arguments)) != DONE:
            if found == UNEQUAL:
                raise RuntimeError("ranks add up different things")
            # Asked once more: one that has given its numbers and then ended is not missed.
            if ended:
                raise RuntimeError(f"rank {ended[0]} has ended")
            ended = [r for r in range(self._ranks) if r != self._rank and not self._lives(r)]
            if time.monotonic() > until:
                raise RuntimeError(f"rank {found} did not come within {TIMEOUT}")

    def close(self) -> None:
        """Give back the file, and the lock with it; the memory goes with the process."""
        os.close(self._file)

    def _lives(self, rank: int) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
        except OSError:
            return True
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, rank)
        return False


def open_together(launch: Launch, gather: Callable[[Any], list[Any]]) -> SharedSums | None:
    """The memory of all ranks, or None on each where they have none in common.

    Processes of several machines have none, nor those of other systems than Linux; where it
    fails for another reason, rank 0 warns. ``gather`` gives every rank's value to every rank.
    """
    if not sys.platform.startswith("linux") or launch.local_ranks != launch.ranks:
        return None
    made, shared, problem = None, None, ""
    if launch.rank == 0:
        try:
            made = _make(launch.ranks)
        except ERRORS as error:
            problem = repr(error)
    path = None if made is None else f"/proc/{os.getpid()}/fd/{made}"
    path, problem = gather((path, problem))[0]
    if path is not None:
        try:
            shared = SharedSums(os.open(path, os.O_RDWR) if made is None else made, launch)
        except ERRORS as error:
            problem = repr(error)
    told = gather((shared is not None, problem))
    if all(has for has, _ in told):
        return shared
    if shared is not None:
        shared.close()
    if launch.rank == 0:
        reason = next(problem for has, problem in told if not has)
        _log.warning("processes add up by gloo, which takes longer: %s", reason)
    return None


def _make(ranks: int) -> int:
    """A descriptor of a file in memory, without a name, that goes with its last user.

    Its room is taken at once: who writes where there is none is killed.
    """
    file = os.memfd_create("posefabric")
    try:
        os.posix_fallocate(file, 0, _load().bytes(ranks, ROOM))
    except ERRORS:
        os.close(file)
        raise
    return file


@functools.cache
def _load() -> ctypes.CDLL:
    """``shared_sums.cpp``, compiled the first time (a second)."""
    library = ctypes.CDLL(str(compile_library(SOURCE, ("-O2",))))
    whole, pointer = ctypes.c_longlong, ctypes.c_void_p
    library.bytes.argtypes, library.bytes.restype = [whole, whole], whole
    library.give.argtypes = [pointer, *[whole] * 4, pointer, whole, whole]
    library.give.restype = None
    library.take.argtypes = [pointer, *[whole] * 4, pointer, whole, whole, ctypes.c_double]
    library.take.restype = whole
    return library
