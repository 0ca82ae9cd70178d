"""Progress: what it writes where there is no terminal, on one, and in which encodings."""

from __future__ import annotations

import io
import sys

import pytest
from rich.table import Table

from prism_jax import progress


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


class Ascii(io.TextIOWrapper):
    """A stream that cannot write anything but ASCII."""

    def __init__(self):
        super().__init__(io.BytesIO(), encoding="ascii", write_through=True)

    def text(self) -> str:
        return self.buffer.getvalue().decode("ascii")


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when told."""

    class Clock:
        now = 100.0

        def __call__(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(progress, "_now", clock)
    return clock


def test_without_a_terminal_there_is_a_line_every_ten_seconds_and_one_at_the_end(clock, capsys):
    with progress.task("recover", 100, unit="batch") as bar:
        for i in range(100):
            clock.now += 0.25
            bar.advance(loss=1.0 / (i + 1))
    assert capsys.readouterr().out.splitlines() == [
        "recover: 40/100 batches, 10 s, 15 s left, loss 0.025",
        "recover: 80/100 batches, 20 s, 5.0 s left, loss 0.0125",
        "recover: 100/100 batches in 25 s, loss 0.01",
    ]


def test_remaining_time_leaves_out_the_first_units_and_what_was_done_before(clock):
    with progress.task("recover", 1000, done=500) as bar:
        clock.now += 60  # compilation
        bar.advance(10)
        assert bar.remaining() is None
        clock.now += 1
        bar.advance(10)
        assert bar.remaining() == pytest.approx(0.1 * 480)
        clock.now += 3
        assert bar.remaining() == pytest.approx(0.1 * 480 - 3)
        with_compilation = (bar.elapsed() - 3) / 20 * 480
        assert with_compilation > 10 * bar.remaining()


def test_a_failure_says_how_far_it_came_and_passes_on(clock, capsys):
    with pytest.raises(KeyboardInterrupt), progress.task("relabel", 5, unit="epoch") as bar:
        clock.now += 90
        bar.advance(2)
        raise KeyboardInterrupt
    assert capsys.readouterr().out.splitlines()[-1] == (
        "relabel: stopped at 2/5 epochs after 1 min 30 s"
    )


def test_tasks_nest_on_a_terminal_and_leave_it_as_it_was(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with progress.task("squeeze", 2, unit="teacher") as outer:
        for _ in range(2):
            with progress.task("train", 3, unit="epoch") as inner:
                inner.advance(3, top1=0.5)
            outer.advance()
        progress.say("between [bold]bars[/bold]")
    assert progress._display is None
    assert sys.stdout is terminal
    written = terminal.getvalue()
    assert "\x1b[?25l" in written  # bars were drawn: the cursor was hidden,
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h")  # and shown again
    assert "[bold]bars[/bold]" in written
    assert written.count("train: 3/3 epochs") == 2
    assert "squeeze: 2/2 teachers" in written


def test_a_terminal_that_cannot_say_it_gets_a_plain_word(monkeypatch):
    stream = Ascii()
    monkeypatch.setattr(sys, "stdout", stream)
    table = Table("top-1")
    table.add_row("93.1 ± 0.4 –")
    progress.say("3 × 4 → 12 … naïve")
    progress.say(table)
    with progress.task("größe", 1) as bar:
        bar.advance()
    text = stream.text()
    assert "3 x 4 -> 12 ... na?ve" in text
    assert "93.1 +/- 0.4 -" in text
    assert "gr??e: 1/1 step in" in text
    with pytest.raises(UnicodeEncodeError):  # what an ordinary print does there
        print("±", file=stream)


def test_long_lines_are_not_broken_where_there_is_no_terminal(capsys):
    progress.say("x" * 300)
    assert capsys.readouterr().out == "x" * 300 + "\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (302, "5 min 02 s"),
        (3599.7, "1 h 00 min"),
        (11_220, "3 h 07 min"),
    ],
)
def test_durations_read_like_a_person_wrote_them(seconds, text):
    assert progress.duration(seconds) == text
