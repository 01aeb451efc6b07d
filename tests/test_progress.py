"""What a log and a terminal show of long work."""

import io
import re

from jaxmem.runs.progress import PlainLines, show_progress, silent


def test_plain_lines_start_estimate_and_end():
    now = iter([0.0, 5.0, 20.0, 21.0, 60.0, 100.0, 101.0])
    stream = io.StringIO()
    progress = PlainLines(stream, every=15.0, clock=lambda: next(now))
    for done in (0, 10, 40, 42, 120):
        progress("train", done, 120)
    progress("train", 0, 7)  # the same task again, of another size
    progress("sample", 3, 3)
    assert stream.getvalue().splitlines() == [
        "train: 0/120",
        "train: 40/120, 0:20 elapsed, about 0:40 left",
        "train: 120/120, 1:00 elapsed",
        "train: 0/7",
        "sample: 3/3",
    ]


def test_resumed_work_is_estimated_from_where_it_started():
    now = iter([0.0, 30.0])
    stream = io.StringIO()
    progress = PlainLines(stream, clock=lambda: next(now))
    progress("train", 900, 1000)
    progress("train", 930, 1000)
    assert stream.getvalue().splitlines()[-1] == "train: 930/1,000, 0:30 elapsed, about 1:10 left"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_bar_per_task_and_a_log_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    for stream, wanted in ((Terminal(), "━"), (io.StringIO(), "train: 4/4")):
        with show_progress(stream) as progress:
            for done in range(5):
                progress("train", done, 4)
            progress("sample", 0, 2)
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
        assert wanted in text
        assert "sample" in text


def test_silent_says_nothing(capsys):
    silent("train", 1, 2)
    assert capsys.readouterr() == ("", "")
