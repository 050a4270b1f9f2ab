"""Torch's large CPU blocks from extents: none lies on another, and what is freed is used again."""

from __future__ import annotations

import gc
import logging
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from posefabric import native
from posefabric.structures import PosefabricError
from posefabric.train import memory
from posefabric.train.memory import keep_freed_memory, load_extents

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="other systems keep their own allocator"
)


def run(script: str) -> str:
    """What a process of its own prints, in which nothing was allocated before."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return done.stdout


def test_a_block_lies_where_blocks_were_freed() -> None:
    script = """
import torch
from posefabric.train.memory import load_extents
load_extents()
page = lambda block: block.data_ptr() // 4096
blocks = [torch.empty(1 << 20) for _ in range(5)]
places = [page(block) for block in blocks]
assert [b - a for a, b in zip(places, places[1:])] == [1025] * 4, places
assert len({block.data_ptr() % 4096 for block in blocks}) == 5, "in other sets of the cache"
blocks[2] = None
again = torch.empty(1 << 20)
assert page(again) == places[2], "one of its own size"
blocks[0] = blocks[1] = None
assert page(torch.empty(1 << 21)) == places[0], "neighbours are one"
pieces = [torch.empty(1 << 19), torch.empty(1 << 19)]
assert sorted(map(page, pieces)) == [places[0], places[0] + 513], "and are cut"
blocks.clear()
del again, pieces
assert page(torch.empty(5 << 20)) == places[0], "all are one"
print("reused")
"""
    assert run(script) == "reused\n"


def test_blocks_of_any_size_keep_what_is_written_in_them() -> None:
    """From four threads; a tensor in float64 is full of its own number."""
    library = load_extents()
    gc.collect()
    before, failures = library.live(), []

    def work(seed: int) -> None:
        draw, held = random.Random(seed), {}
        for turn in range(400):
            if held and draw.random() < 0.45:
                number, block = held.popitem()
                if not bool((block == number).all()):
                    failures.append(number)
            else:
                number = float(seed * 1000 + turn)
                block = torch.full((draw.randrange(1, 200_000),), number, dtype=torch.float64)
                held[number] = block
                if block.data_ptr() % 64:
                    failures.append(number)
        failures.extend(n for n, block in held.items() if not bool((block == n).all()))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert library.live() == before, "all is given back"


def test_small_blocks_and_those_of_before_are_freed_too() -> None:
    """In a process of its own, where torch has blocks before the allocator is there."""
    script = """
import torch
before = torch.ones(1 << 20)
from posefabric.train.memory import load_extents
library = load_extents()
assert library.live() == 0
small = torch.ones(10)
assert library.live() == 0
large = before.clone()
large.untyped_storage().resize_(1 << 25)
assert library.live() >= 1 << 25
assert float(before.sum()) == 1 << 20
del before, small, large
assert library.live() == 0
print("freed")
"""
    assert run(script) == "freed\n"


def test_a_forked_process_allocates_while_a_thread_did() -> None:
    load_extents()
    stop = threading.Event()

    def allocate() -> None:
        while not stop.is_set():
            torch.empty(1 << 16)

    thread = threading.Thread(target=allocate)
    thread.start()
    try:
        for _ in range(20):
            child = os.fork()
            if child == 0:
                signal.alarm(20)  # a list that stayed locked would hold it for ever
                os._exit(len(torch.empty(1 << 16)) != 1 << 16)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        stop.set()
        thread.join()


def test_where_nothing_can_be_compiled_the_heap_stays(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "_compiler", lambda: None)
    monkeypatch.setattr(memory, "load_extents", load_extents.__wrapped__)
    with caplog.at_level(logging.WARNING):
        keep_freed_memory(CPU)
    assert "no C++ compiler" in caplog.text and "heap" in caplog.text
    keep_freed_memory(torch.device("cuda"))
    assert len(caplog.records) == 1, "a GPU's maps are elsewhere"


def test_where_no_room_can_be_reserved_the_heap_stays() -> None:
    script = """
import resource
import torch
from posefabric.train.memory import keep_freed_memory, load_extents
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
keep_freed_memory(torch.device("cpu"))
assert float(torch.ones(1 << 20).sum()) == 1 << 20
load_extents.cache_info().currsize or print("heap")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "heap\n" and "ulimit" in done.stderr, done.stderr


def test_a_compiler_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    wrong = tmp_path / "wrong.cpp"
    wrong.write_text("int answer( {")
    with pytest.raises(PosefabricError, match=r"did not compile wrong\.cpp: .*error"):
        native.compile_library(wrong, ())
    right = tmp_path / "right.cpp"
    right.write_text('extern "C" int answer() { return 42; }')
    first = native.compile_library(right, ())
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "right.cpp").write_text(right.read_text())
    assert first == native.compile_library(elsewhere / "right.cpp", ()), "the same source"
    assert first == native.compile_library(right, ()) and first.parent == tmp_path / "posefabric"
    assert first != native.compile_library(right, (), built_for="another version")
    (elsewhere / "beside.h").write_text("// changed")
    assert first != native.compile_library(elsewhere / "right.cpp", ()), "another header"
