"""Error classes. A UserError is shown as one message; any other error is a bug and shows its traceback."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake of the user. The message says what is wrong, where, and what to do."""


class WriteError(UserError):
    """A library could not write a file, as on a full disk, and said so in an error of its own."""


def first_line(error: BaseException, lines: int = 1) -> str:
    """Return the first lines of a library's error as one, or the error's name if it has no text.

    Args:
        lines: how many. `datasets` says what is wrong in the first and what would be right in the second.
    """
    said = (str(error).strip() or type(error).__name__).splitlines()
    return " ".join(said[:lines])
