"""The one exception a user ever sees."""

from __future__ import annotations


class LabError(Exception):
    """Bad input, told in one sentence: what was wrong, what was given, what to do.

    The command line prints it and exits with 2; the page shows it beside the control; a run that
    raises it fails with this sentence as its message.
    """
