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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posefabric.distributed.adder import Adder, address_of
from posefabric.distributed.launch import TIMEOUT, Launch
from posefabric.native import compile_library
from posefabric.structures import PosefabricError

if TYPE_CHECKING:
    from torch import Tensor

SOURCE = Path(__file__).with_name("shared_sums.cpp")
ROOM = 1 << 20  # bytes of a rank's array; what is larger comes in pieces
ERRORS = (OSError, ValueError, AttributeError, RuntimeError, PosefabricError)
UNEQUAL = -2
LOOK_S = 0.25  # between looks at whether a rank that is waited for still lives


_log = logging.getLogger(__name__)


_ASK = ctypes.CFUNCTYPE(None, ctypes.c_longlong, ctypes.c_longlong, ctypes.POINTER(ctypes.c_int))


class _Group(ctypes.Structure):
    """As in ``shared_sums.cpp``."""

    _fields_ = (
        ("memory", ctypes.c_void_p),
        ("ranks", ctypes.c_longlong),
        ("room", ctypes.c_longlong),
        ("rank", ctypes.c_longlong),
        ("step", ctypes.c_longlong),
        ("patience", ctypes.c_double),
        ("ask", _ASK),
    )


class SharedSums:
    """The memory of all ranks, which have to call :meth:`add`, :meth:`add_in_place`
    and ``adder`` equally often.

    A rank holds a lock on its byte of the file, which the system takes back when it ends, however
    it ends. Raises one of ``ERRORS`` where the file cannot be mapped; it is closed then.

    Args:
        file: a descriptor of the memory, from now on this object's; another one of the same file
            must not be closed in this process, which would take back the lock.
    """

    def __init__(self, file: int, launch: Launch) -> None:
        self._file = file
        self._rank, self._ranks = launch.rank, launch.ranks
        self._ended: list[int] = []
        self._until = 0.0
        self._problem: BaseException | None = None
        try:
            self._library = _load()
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, self._rank)
            self._memory = mmap.mmap(file, self._library.bytes(self._ranks, ROOM))
        except ERRORS:
            os.close(file)
            raise
        place = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        ask = _ASK(self._wait_on)
        self._group = _Group(place, self._ranks, ROOM, self._rank, 0, LOOK_S, ask)
        self.adder = Adder(
            address_of(self._library.add_doubles),
            ctypes.addressof(self._group),
            self._take_problem,
            owner=self._group,
        )

    def add(self, own: Tensor) -> Tensor:
        """The sum over all ranks of float32 or float64 (n,); the same bits on each.

        Raises RuntimeError, as torch's own collectives, when a rank has ended or stays away.
        """
        own = own.contiguous()
        total = own.new_empty(own.shape)
        self._add([own], [total])
        return total

    def add_in_place(self, tensors: Sequence[Tensor]) -> None:
        """The same for tensors of one type, without gaps and laid out alike on every rank."""
        self._add(tensors, tensors)

    def _add(self, given: Sequence[Tensor], sums: Sequence[Tensor]) -> None:
        full = [i for i, tensor in enumerate(given) if tensor.numel()]
        size, count = given[0].element_size(), len(full)
        pointers, sizes = ctypes.c_void_p * count, ctypes.c_longlong * count
        failed = self._library.add(
            ctypes.byref(self._group),
            pointers(*(given[i].data_ptr() for i in full)),
            pointers(*(sums[i].data_ptr() for i in full)),
            sizes(*(given[i].numel() * size for i in full)),
            count,
            size == 8,
        )
        if failed:
            raise self._take_problem()

    def _wait_on(self, rank: int, asked: int, answer: Any) -> None:
        """Called by the library while it waits."""
        try:
            self._look(rank, asked)
            answer[0] = 1
        except BaseException as error:  # Ctrl-C too: none passes through compiled code
            self._problem = error

    def _take_problem(self) -> BaseException:
        # What nobody could keep came before the first line: Ctrl-C.
        found, self._problem = self._problem or KeyboardInterrupt(), None
        return found

    def _look(self, rank: int, asked: int) -> None:
        if rank == UNEQUAL:
            raise RuntimeError("ranks add up different things")
        if asked == 0:
            self._ended, self._until = [], time.monotonic() + TIMEOUT.total_seconds()
        # Asked once more: one that has given its numbers and then ended is not missed.
        if self._ended:
            raise RuntimeError(f"rank {self._ended[0]} has ended")
        self._ended = [r for r in range(self._ranks) if r != self._rank and not self._lives(r)]
        if time.monotonic() > self._until:
            raise RuntimeError(f"rank {rank} did not come within {TIMEOUT}")

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
    library.add.argtypes = [pointer, pointer, pointer, pointer, whole, whole]
    return library
