"""What a person sees while a run works: bars on a terminal, plain lines everywhere else.

    with progress.task("recover", 40_000, unit="iteration") as bar:
        bar.advance(50, loss=2.31)
    progress.say("Teachers are ready.")

Tasks nest. On a terminal each open one is a bar with its remaining time; in a log file, a
notebook or a pipe it is one line at most every ten seconds. Both end with one line that stays.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
from rich.text import Text

SECONDS_BETWEEN_LINES = 10.0

_WIDTH_WITHOUT_TERMINAL = 120
_PLAIN = str.maketrans(
    {"–": "-", "—": "-", "−": "-", "±": "+/-", "×": "x", "→": "->", "…": "...", "·": "-", "█": "#"}
    | dict.fromkeys("─━═╌", "-")
    | dict.fromkeys("│┃║", "|")
)

_now = time.monotonic
_display: Progress | None = None
_speaker: str | None = None


def speak_as(process: str) -> None:
    """Name the process in every line from now on, and draw no bars: one process does that."""
    global _speaker
    _speaker = process


def say(what: RenderableType) -> None:
    """Print a line of text or a rich renderable, above any bars that are drawn."""
    if _speaker and isinstance(what, str):
        what = f"[{_speaker}] {what}"
    console = _display.console if _display else _console()
    soft_wrap = isinstance(what, str)  # a long line is the terminal's to break, not ours
    console.print(what, markup=False, highlight=False, soft_wrap=soft_wrap)


@contextlib.contextmanager
def task(name: str, total: int, *, unit: str = "step", done: int = 0) -> Iterator[Bar]:
    """Show the progress of a piece of work.

    Args:
      name: what is being done, in a word or two.
      total: how much there is to do, in units.
      unit: what is counted, in the singular.
      done: how much of it an earlier run has already done.

    Yields:
      A ``Bar`` to advance.
    """
    bar = Bar(name, total, unit, done)
    with _drawn(bar):
        try:
            yield bar
        except BaseException:
            say(f"{name}: stopped at {bar.count()} after {duration(bar.elapsed())}")
            raise
        say(", ".join([f"{name}: {bar.count()} in {duration(bar.elapsed())}", *bar.notes()]))


class Bar:
    """One task's progress; ``task`` makes it."""

    def __init__(self, name: str, total: int, unit: str, done: int):
        self.name, self.total, self.done = name, total, done
        self._unit = unit
        self._fields: dict[str, Any] = {}
        self._started = self._printed = _now()
        self._first: tuple[float, int] | None = None
        self._last = (self._started, done)
        self._id: Any = None

    def advance(self, n: int = 1, **fields: Any) -> None:
        """Count ``n`` more units, and show the newest value of each field beside them."""
        self._fields |= fields
        if n:
            self.done += n
            self._last = (_now(), self.done)
            # The first units contain the compilation: they say nothing of the speed.
            self._first = self._first or self._last
        if self._id is not None and _display:
            _display.update(self._id, completed=self.done)
        elif _now() - self._printed >= SECONDS_BETWEEN_LINES:
            self._printed = _now()
            say(f"{self.name}: {self.status()}")

    def status(self) -> str:
        """The count, the time gone, the time left where it is known, and the fields."""
        parts = [self.count(), duration(self.elapsed())]
        if (left := self.remaining()) is not None:
            parts.append(f"{duration(left)} left")
        return ", ".join([*parts, *self.notes()])

    def count(self) -> str:
        """How many of how many units are done."""
        plural = "es" if self._unit.endswith(("s", "x", "tch", "sh")) else "s"
        return f"{self.done}/{self.total} {self._unit}{plural if self.total != 1 else ''}"

    def elapsed(self) -> float:
        """Seconds since the task began."""
        return _now() - self._started

    def remaining(self) -> float | None:
        """Seconds left at the mean speed so far, or None before there is one."""
        if self._first is None or self._last[1] == self._first[1]:
            return None
        (start, start_done), (last, last_done) = self._first, self._last
        seconds_per_unit = (last - start) / (last_done - start_done)
        return max(0.0, seconds_per_unit * (self.total - last_done) - (_now() - last))

    def notes(self) -> list[str]:
        """The fields as "name value"."""
        return [f"{key} {_value(value)}" for key, value in self._fields.items()]


def duration(seconds: float) -> str:
    """Write a number of seconds as a person would: "0.4 s", "38 s", "5 min 02 s", "3 h 07 min"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def _value(value: Any) -> str:
    return str(value) if isinstance(value, (str, int)) else f"{value:.4g}"


# --- the terminal ---------------------------------------------------------------------------


class _Portable:
    """A text stream that spells out what its encoding cannot say."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self.encoding = getattr(stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        try:
            text.encode(self.encoding)
        except UnicodeEncodeError:
            text = text.translate(_PLAIN).encode(self.encoding, "replace").decode(self.encoding)
        return self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()


def _console() -> Console:
    """A console on what standard output is now; wide where there is no terminal to fit."""
    stream: Any = _Portable(sys.stdout)  # all that Rich asks of a file
    console = Console(file=stream, force_jupyter=False)
    if console.is_interactive:
        return console
    return Console(file=stream, force_jupyter=False, width=_WIDTH_WITHOUT_TERMINAL, no_color=True)


class _Status(ProgressColumn):
    """The text beside a bar, computed when it is drawn."""

    def render(self, task: Any) -> Text:
        return Text(task.fields["bar"].status(), style="dim")


@contextlib.contextmanager
def _drawn(bar: Bar) -> Iterator[None]:
    """Draw a bar while its task is open; the first opens the display, the last closes it."""
    global _display
    outermost = _display is None
    if outermost and not _speaker and (console := _console()).is_interactive:
        columns = TextColumn("[bold]{task.description}"), BarColumn(bar_width=24), _Status()
        _display = Progress(*columns, console=console, transient=True, refresh_per_second=4)
        _display.start()
    if _display:
        bar._id = _display.add_task(bar.name, total=bar.total, completed=bar.done, bar=bar)
    try:
        yield
    finally:
        if _display:
            _display.remove_task(bar._id)
            if outermost:
                _display.stop()
                _display = None


def hours_of(hours: float) -> str:
    """A duration for people."""
    if hours < 1 / 60:
        return f"{3600 * hours:.0f} s"
    return f"{60 * hours:.0f} min" if hours < 1 else f"{hours:.1f} h"
