"""The exceptions whose message is all that a person needs."""

from __future__ import annotations


class UserError(Exception):
    """Something given cannot be used.

    The message says what was given, what is allowed, and what to do. ``main`` prints it
    without a traceback and exits with status 2, before any long work and with nothing lost.
    """


class Unreachable(UserError):
    """Others that this process needs are not there: the same command may succeed later.

    It ends with status 1, which those who start jobs again do not take for a wrong setting.
    """
