"""The exceptions whose message is all that a person needs."""

from __future__ import annotations

import signal
from typing import Any, NoReturn


class UserError(Exception):
    """Something given cannot be used.

    The message says what was given, what is allowed, and what to do. ``main`` prints it
    without a traceback and exits with status 2, before any long work and with nothing lost.
    """


class Unreachable(UserError):
    """Others that this process needs are not there: the same command may succeed later.

    It ends with status 1, which those who start jobs again do not take for a wrong setting.
    """


class EarlyInterrupt:
    """Handles Ctrl-C until there is work to save: raises KeyboardInterrupt, and remembers that.

    What is raised while JAX's callback collects garbage is printed and lost.
    """

    came = False

    def __call__(self, signum: int, frame: Any) -> NoReturn:
        self.came = True
        raise KeyboardInterrupt


def raise_early_interrupt() -> None:
    """Raise the KeyboardInterrupt that came and was lost, if one was."""
    handler = signal.getsignal(signal.SIGINT)
    if isinstance(handler, EarlyInterrupt) and handler.came:
        raise KeyboardInterrupt
