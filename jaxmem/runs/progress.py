"""Progress of long work: one callable, ``progress(task, done, total)``, and how terminals and logs show it."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

#: Called with the name of a task, its finished units and all its units. A resumed task starts at what was there; the
#: first call of a task shows it, and ``done == total`` closes it.
Progress = Callable[[str, int, int], None]


def silent(task: str, done: int, total: int) -> None:
    """Show nothing; the default of every function with a ``progress`` argument."""


Say = Callable[[str], None]  #: Called with one line for the user, such as the expected duration.


def quiet(line: str) -> None:
    """Show nothing; the default of every function with a ``say`` argument."""


class PlainLines:
    """Progress as lines for logs: start and end of each task, and one line in ``every`` seconds between them."""

    def __init__(self, stream: Any, every: float = 15.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.stream, self.every, self.clock = stream, every, clock
        self._first: dict[str, tuple[float, int]] = {}
        self._last: dict[str, float] = {}

    def __call__(self, task: str, completed: int, total: int) -> None:
        now = self.clock()
        new = task not in self._first
        if new:
            self._first[task] = (now, completed)
        done = completed >= total
        if not (new or done or now - self._last[task] >= self.every):
            return
        self._last[task] = now
        started, offset = self._first[task]
        text = f"{task}: {completed:,}/{total:,}"
        if completed > offset:
            seconds = now - started
            left = seconds * (total - completed) / (completed - offset)
            text += f", {_clock(seconds)} elapsed" + ("" if done else f", about {_clock(left)} left")
        print(text, file=self.stream, flush=True)
        if done:  # the same task may come again, for instance for another model
            del self._first[task], self._last[task]


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"


@contextmanager
def show_progress(stream: Any = None) -> Iterator[Progress]:
    """Yield a progress callable: bars on a terminal, `PlainLines` elsewhere.

    Args:
        stream: a text stream; standard error by default, because standard output is for results.
    """
    stream = sys.stderr if stream is None else stream
    if not stream.isatty():
        yield PlainLines(stream)
        return

    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=Console(file=stream)) as bars:
        ids: dict = {}

        def advance(task: str, completed: int, total: int) -> None:
            if task not in ids or bars.tasks[ids[task]].finished:
                ids[task] = bars.add_task(task, total=total, completed=completed)
            bars.update(ids[task], completed=completed, total=total)

        yield advance
