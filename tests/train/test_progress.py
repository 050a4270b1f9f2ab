import io
import multiprocessing
import os
import re
import signal
import threading
import time

import pytest
from rich.console import Console

from posefabric.train.progress import Progress, StopRequest


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def lines_of(file):
    return file.getvalue().splitlines()


def test_plain_lines_about_every_interval_and_time_left():
    file, clock = io.StringIO(), Clock()
    console = Console(file=file, force_terminal=False, width=40)
    with Progress(console=console, clock=clock, interval_s=30) as progress:
        progress.start(100, "search")
        for step in range(1, 101):
            clock.now += 2.0
            progress.update(step, {"loss": 1.0 / step, "images_per_s": 210.04})
    lines = lines_of(file)
    # 200 s at 30 s a line, the first line and the last.
    assert len(lines) == 1 + 6 + 1
    assert lines[0] == "search  0/100  0%  left ?"
    # 15 steps of 2 s are 30 s; 85 steps are left.
    assert lines[1] == "search  15/100  15%  left 2:50  loss 0.06667  images/s 210"
    assert lines[-1].startswith("search  100/100  100%  took 3:20  loss 0.01")


def test_time_left_after_a_resume_counts_only_the_steps_of_this_process():
    file, clock = io.StringIO(), Clock()
    progress = Progress(console=Console(file=file), clock=clock, interval_s=0)
    progress.start(1000, "train", step=900)
    for step in range(901, 911):
        clock.now += 10.0
        progress.update(step)
    assert "910/1000  91%  left 15:00" in progress.line()


def test_a_terminal_gets_one_line_that_is_overwritten():
    file, clock = io.StringIO(), Clock()
    console = Console(file=file, force_terminal=True, width=60, _environ={"TERM": "xterm"})
    with Progress(console=console, clock=clock) as progress:
        progress.start(50, "search")
        for step in range(1, 51):
            clock.now += 1.0
            progress.update(step, {"loss": 0.5, "entropy": 0.25, "a_value_that_is": "too long" * 9})
    text = file.getvalue()
    assert text.count("\n") == 1
    assert "50/50" in text and "left 0:25" in text
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert max(len(line) for line in re.split(r"[\r\n]", shown)) <= 60
    assert text.rstrip().endswith("\x1b[?25h")  # the cursor is shown again


def test_values_are_read_only_for_a_shown_line():
    class Costly:
        reads = 0

        def __float__(self):
            Costly.reads += 1
            return 1.0

    clock = Clock()
    progress = Progress(console=Console(file=io.StringIO()), clock=clock, interval_s=30)
    progress.start(1000, "search")
    for step in range(1000):
        clock.now += 0.1
        progress.update(step, {"loss": Costly()})
    assert Costly.reads == 3
    progress.finish()


def test_a_lost_output_does_not_end_the_run():
    read_end, write_end = os.pipe()
    os.close(read_end)
    file = os.fdopen(write_end, "w")
    with Progress(console=Console(file=file), interval_s=0) as progress:
        progress.start(3, "search")
        progress.update(1, {"loss": float("nan")})
    with pytest.raises(BrokenPipeError):
        file.close()


def test_not_a_number_is_shown_and_disabled_is_silent():
    file = io.StringIO()
    with Progress(console=Console(file=file)) as progress:
        progress.start(2, "search")
        progress.update(1, {"loss": float("nan"), "pictures": 12345, "lr": 2.5e-5})
    assert lines_of(file)[-1].endswith("loss nan  pictures 12345  lr 2.5e-05")
    quiet = io.StringIO()
    with Progress(console=Console(file=quiet), enabled=False) as progress:
        progress.start(2, "search")
        progress.update(1, {"loss": 1.0})
    assert quiet.getvalue() == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_sets_the_flag_and_handlers_come_back(number):
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        assert stop.signal_name == signal.Signals(number).name
    assert {n: signal.getsignal(n) for n in before} == before


def test_a_second_interrupt_raises_and_a_second_sigterm_does_not():
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def test_an_enclosing_request_is_told():
    with StopRequest() as outer:
        with StopRequest() as inner:
            os.kill(os.getpid(), signal.SIGINT)
            assert inner.requested and outer.requested
        with StopRequest() as later:
            assert not later.requested


def test_no_handlers_outside_the_main_thread():
    before, seen = signal.getsignal(signal.SIGINT), []

    def work():
        with StopRequest() as stop:
            seen.append((stop.requested, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


def _wait(started):
    started.set()
    time.sleep(30)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_worker_ignores_ctrl_c_and_ends_on_terminate():
    context = multiprocessing.get_context("fork")
    started = context.Event()
    with StopRequest() as stop:
        worker = context.Process(target=_wait, args=(started,), daemon=True)
        worker.start()
        assert started.wait(10)
        os.kill(worker.pid, signal.SIGINT)
        worker.join(0.2)
        assert worker.is_alive()
        worker.terminate()
        worker.join(10)
        assert worker.exitcode == -signal.SIGTERM
        assert not stop.requested
