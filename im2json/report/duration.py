"""Durations as people read them: in columns of a table, and in a sentence."""

from __future__ import annotations


def clock_time(seconds: float) -> str:
    """Return a duration for a table: 0:59, 12:34 or 1:23:45."""
    hours, minutes, rest = _parts(seconds)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def duration(seconds: float) -> str:
    """Return a duration for a sentence: hours and minutes, minutes and seconds, or seconds alone."""
    hours, minutes, rest = _parts(seconds)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _parts(seconds: float) -> tuple[int, int, int]:
    """Return whole hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return *divmod(minutes, 60), rest
