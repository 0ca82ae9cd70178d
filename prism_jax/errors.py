"""The one exception that stands for a person's mistake."""

from __future__ import annotations


class UserError(Exception):
    """Something given cannot be used.

    The message says what was given, what is allowed, and what to do. ``main`` prints it
    without a traceback and exits with status 2, before any long work and with nothing lost.
    """
