"""Draw plots as SVG text for an HTML page: estimates with intervals, and curves, in the ink of the page."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "currentColor")
"""The colours of Okabe and Ito, which colour-blind people can tell apart, without yellow, which is faint on white."""
DASHES = ("none", "8 4", "2 3", "10 3 2 3", "16 4", "8 3 2 3 2 3")

# All in pixels.
WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 34, 40
FONT_SIZE = 12
CHARACTER = 7  # a little more than the mean width of a character
LONGEST_LABEL = 24  # in characters; hovering shows the rest
NARROWEST, TILTED = 64, 26  # the least width of a value on an axis, with upright and with tilted labels


@dataclass(frozen=True)
class Estimate:
    """A value with its interval."""

    label: str
    value: float | None  # None: only the label is drawn
    low: float | None = None
    high: float | None = None
    singles: Sequence[float] = ()  # the values of which this is the mean


@dataclass(frozen=True)
class Curve:
    """A line through points."""

    name: str
    style: int  # its colour and dashes; curves may share them
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class _Scale:
    """An axis: round values, the first at pixel `start` and the last at pixel `end`."""

    ticks: Sequence[float]
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(v) if self.log else v for v in (self.ticks[0], self.ticks[-1], value))
        return self.start + (self.end - self.start) * (value - low) / (high - low)


def estimate_plot(estimates: Sequence[Estimate], x_label: str, y_label: str) -> str:
    """Draw the estimates side by side, in the order given; return nothing if none has a value."""
    known = [e for e in estimates if e.value is not None]
    values = [v for e in known for v in (e.value, e.low, e.high, *e.singles) if v is not None]
    if not values:
        return ""
    longest = CHARACTER * max(len(_shortened(e.label)) for e in estimates)
    spacing: float = max(NARROWEST, longest + 2 * CHARACTER)
    tilted = LEFT + spacing * len(estimates) + RIGHT > WIDTH
    spacing = TILTED if tilted else spacing
    lean = longest * 0.71 if tilted else 0  # the sine of 45 degrees
    left = max(LEFT, lean)
    width = max(WIDTH // 2, left + spacing * len(estimates) + RIGHT)
    spacing = (width - left - RIGHT) / len(estimates)
    y = _Scale(round_ticks(min(values), max(values)), HEIGHT - BOTTOM, TOP)
    parts = []
    for i, estimate in enumerate(estimates):
        x = left + spacing * (i + 0.5)
        parts.append(_x_label(x, estimate.label, tilted, muted=estimate.value is None))
        parts.append(_estimate(x, y, estimate))
    return _svg(left, width, HEIGHT + lean, x_label, y_label, y, parts)


def curve_plot(curves: Sequence[Curve], x_label: str, y_label: str, log: bool = False) -> str:
    """Draw curves over whole numbers from 0 on, the first on top; return nothing if no curve has a point.

    A logarithmic scale leaves out points that are not positive.
    """
    drawn = [(curve, [(x, y) for x, y in curve.points if math.isfinite(y) and (y > 0 or not log)]) for curve in curves]
    points = [point for _, kept in drawn for point in kept]
    if not points:
        return ""
    heights = [y for _, y in points]
    ticks = log_ticks(min(heights), max(heights)) if log else round_ticks(min(heights), max(heights))
    y = _Scale(ticks, HEIGHT - BOTTOM, TOP, log)
    x = _Scale(round_ticks(0, max(max(x for x, _ in points), 1), least=1), LEFT, WIDTH - RIGHT)
    parts = [_text(x(tick), HEIGHT - BOTTOM + 18, _number(tick), "middle") for tick in x.ticks]
    for curve, kept in reversed(drawn):
        title = f"<title>{html.escape(curve.name)}</title>"
        if len(kept) == 1:  # a line through one point would not be seen
            where = f'cx="{x(kept[0][0]):.1f}" cy="{y(kept[0][1]):.1f}" r="3.5"'
            parts.append(f'<circle {where} fill="{_colour(curve.style)}">{title}</circle>')
        elif kept:
            path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in kept)
            parts.append(f'<polyline points="{path}" fill="none" {_stroke(curve.style)}>{title}</polyline>')
    return _svg(LEFT, WIDTH, HEIGHT, x_label, y_label, y, parts)


def legend(names: Iterable[str]) -> str:
    """Return an HTML list of the styles 0, 1, 2, ... and their names."""
    items = (
        f'<li><svg width="36" height="10"><line x1="0" y1="5" x2="36" y2="5" {_stroke(style)}/></svg> '
        f"{html.escape(name)}</li>"
        for style, name in enumerate(names)
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def thinned(points: Sequence[tuple[float, float]], most: int = 100) -> list[tuple[float, float]]:
    """Return at most `most` points, each the mean of neighbouring points."""
    size = max(1, math.ceil(len(points) / most))
    shares = (points[i : i + size] for i in range(0, len(points), size))
    return [(sum(x for x, _ in share) / len(share), sum(y for _, y in share) / len(share)) for share in shares]


def round_ticks(low: float, high: float, most: int = 6, least: float = 0.0) -> list[float]:
    """Return about `most` multiples of 1, 2 or 5 times a power of ten, `least` or more apart, around low and high."""
    if low == high:
        gap = abs(low) / 10 or 1.0
        low, high = (low - gap, high) if low > 0 else (low, high + gap)
    rough = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    # 1e-9 makes up for rounding: 0.3 / 0.1 is less than 3.
    step = max(least, next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9)))
    return [i * step for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten that enclose low and high; if they are few, also 2 and 5 times them."""
    high = high if high > low else 2 * low
    multiples = (1,) if high / low > 1000 else (1, 2, 5)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [m * 10.0**decade for decade in decades for m in multiples]
    first = max(i for i, tick in enumerate(ticks) if tick <= low * (1 + 1e-9))
    last = min(i for i, tick in enumerate(ticks) if tick >= high * (1 - 1e-9))
    return ticks[first : last + 1]


def _estimate(x: float, y: _Scale, estimate: Estimate) -> str:
    """Draw a dot, its interval as a bar, and beside it the single values."""
    if estimate.value is None:
        return ""
    title, bar = f"{estimate.label}: {estimate.value:.3f}", ""
    if estimate.low is not None and estimate.high is not None:
        title += f" [{estimate.low:.3f}, {estimate.high:.3f}]"
        low, high = y(estimate.low), y(estimate.high)
        caps = f"M{x - 6:.1f} {low:.1f}h12M{x - 6:.1f} {high:.1f}h12"
        bar = f'<path d="M{x:.1f} {low:.1f}V{high:.1f}{caps}" fill="none" {_stroke(0)}/>'
    singles = "".join(
        f'<circle cx="{x + 12:.1f}" cy="{y(v):.1f}" r="2.5" fill="{_colour(3)}"/>' for v in estimate.singles
    )
    dot = f'<circle cx="{x:.1f}" cy="{y(estimate.value):.1f}" r="5" fill="{_colour(0)}"/>'
    return f"<g><title>{html.escape(title)}</title>{bar}{dot}{singles}</g>"


def _x_label(x: float, label: str, tilted: bool, muted: bool) -> str:
    y = HEIGHT - BOTTOM + 18
    turn = f' transform="rotate(-45 {x + 4:.1f} {y})"' if tilted else ""
    faint = ' opacity="0.5"' if muted else ""
    position = f'x="{x + 4 * tilted:.1f}" y="{y}" text-anchor="{"end" if tilted else "middle"}"'
    title = f"<title>{html.escape(label)}</title>"
    return f'<text {position} fill="currentColor"{turn}{faint}>{html.escape(_shortened(label))}{title}</text>'


def _svg(left: float, width: float, height: float, x_label: str, y_label: str, y: _Scale, parts: Sequence[str]) -> str:
    """Draw the parts between the axes. The label of y is above the plot, so that it need not be turned."""
    grid = "".join(
        f'<line x1="{left:.1f}" y1="{y(tick):.1f}" x2="{width - RIGHT}" y2="{y(tick):.1f}" stroke="currentColor" '
        f'stroke-opacity="{0.6 if i == 0 else 0.15}"/>{_text(left - 8, y(tick) + 4, _number(tick), "end")}'
        for i, tick in enumerate(y.ticks)
    )
    labels = _text(8, 16, y_label, "start") + _text((left + width - RIGHT) / 2, height - 5, x_label, "middle")
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
    name = html.escape(f"{y_label} against {x_label}")
    return f'<svg {size} role="img" aria-label="{name}" font-size="{FONT_SIZE}">{grid}{labels}{"".join(parts)}</svg>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="currentColor">{html.escape(text)}</text>'


def _colour(style: int) -> str:
    return COLOURS[style % len(COLOURS)]


def _stroke(style: int) -> str:
    dashes = DASHES[style // len(COLOURS) % len(DASHES)]
    return f'stroke="{_colour(style)}" stroke-width="1.8" stroke-dasharray="{dashes}"'


def _number(value: float) -> str:
    return f"{value:,.10g}"


def _shortened(label: str) -> str:
    return label if len(label) <= LONGEST_LABEL else label[: LONGEST_LABEL - 1] + "…"
