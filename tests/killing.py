"""Interruptions at a chosen moment: an exception within a test, or SIGKILL within or from outside a process."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Stopped(Exception):
    """Stands for a kill within the process of a test."""


def stop(*_: Any, **__: Any) -> None:
    raise Stopped


def die(*_: Any, **__: Any) -> None:
    """End this process as a power cut would: nothing is flushed, closed or cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(number: int, function: Callable, then: Callable) -> Callable:
    """``function``, but in its call number ``number``, counted from 1, ``then`` comes first."""
    calls = 0

    def counting(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            then(*arguments, **options)
        return function(*arguments, **options)

    return counting


def signal_when(
    process: subprocess.Popen,
    condition: Callable[[], Any],
    sent: int = signal.SIGKILL,
    *,
    after: float = 0.0,
    seconds: float = 600,
) -> None:
    """Send a signal ``after`` some seconds once the condition holds; return where the process ends before.

    Raises:
        TimeoutError: neither happened in so many seconds; the process is killed.
    """
    deadline = time.monotonic() + seconds
    while process.poll() is None:
        if condition():
            time.sleep(after)
            process.send_signal(sent)
            return
        if time.monotonic() > deadline:
            process.kill()
            process.wait()
            raise TimeoutError(f"nothing to interrupt in {seconds} s")
        time.sleep(0.002)


def recorded(rows: Path, count: int, what: bytes = b"\n") -> Callable[[], bool]:
    """The condition that ``what`` is at least ``count`` times in a file: lines by default."""
    return lambda: rows.exists() and rows.read_bytes().count(what) >= count


def recorded_within(folder: Path, count: int) -> Callable[[], bool]:
    """The condition that a run and those within its folder have at least ``count`` units together."""
    looks = [folder / "at-images" / name for name in ("with-captions", "without-captions")]
    files = [run / "results-0.jsonl" for run in (folder, *looks)]
    return lambda: sum(rows.read_bytes().count(b"\n") for rows in files if rows.exists()) >= count
