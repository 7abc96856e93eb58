"""Tables and pictures as a person sees them."""

import itertools
import json
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
from helpers import calls_of
from PIL import Image

from im2json.report import before_after_table, table
from im2json.report import picture as panels
from im2json.report.duration import clock_time, duration
from im2json.report.picture import prediction_panel
from im2json.report.plot import Curve, Estimate, curve_plot, estimate_plot, legend, log_ticks, round_ticks, thinned

TARGET = json.dumps({"menu": [{"nm": "nasi goreng", "cnt": "1"}], "total": {"total_price": "12.000"}})


def test_table():
    text = table([["a", 1, 0.5, None], ["long name", 1200, -2.0, "x"]], ["name", "rows", "score", "why"])
    assert text.splitlines() == [
        "name       rows   score  why",
        "---------  ----  ------  ---",
        "a             1   0.500  -",
        "long name  1200  -2.000  x",
    ]


def test_table_of_odd_cells():
    lines = table([["東京", True], ["a\nb\x1b[31m", False], ["e\u0301", None]], ["key", "ok"]).splitlines()
    assert lines[2] == "東京          yes"
    assert lines[3] == r"a\nb\x1b[31m  no"
    assert lines[4] == "e\u0301             -"
    assert table([], ["metric", "value"]).splitlines() == ["metric  value", "------  -----"]
    with pytest.raises(ValueError, match="2 cells under 1 headers"):
        table([[1, 2]], ["one"])


@pytest.mark.parametrize(
    ("seconds", "clock", "words"),
    [(4.4, "0:04", "4 s"), (3599.7, "1:00:00", "1 h 0 min"), (90061, "25:01:01", "25 h 1 min")],
)
def test_durations(seconds, clock, words):
    assert (clock_time(seconds), duration(seconds)) == (clock, words)


def test_before_after():
    before = {"loss": 2.5, "edit_distance": 0.9, "field_f1": 0.01, "exact_match": 0.0, "num": 100}
    after = {"edit_distance": 0.02, "field_f1": 0.971234, "exact_match": 0.0001, "num": 100, "loss": 0.5}
    rows = [line.split("  ") for line in before_after_table(before, after).splitlines()[2:]]
    assert [[cell.strip() for cell in row if cell.strip()] for row in rows] == [
        ["exact_match", "0.000", "0.000", "0.000", "same"],
        ["field_f1", "0.010", "0.971", "+0.961", "better"],
        ["edit_distance (lower is better)", "0.900", "0.020", "-0.880", "better"],
        ["loss", "2.500", "0.500", "-2.000"],
    ]


@pytest.mark.parametrize(("num", "says"), [(4, "too few"), (5, "better")])
def test_a_few_examples_are_not_called_better(num, says):
    text = before_after_table({"field_f1": 0.0, "num": num}, {"field_f1": 1.0, "num": num})
    assert text.splitlines()[2].split(maxsplit=4) == ["field_f1", "0.000", "1.000", "+1.000", says]


def test_worse_missing_and_undefined():
    text = before_after_table(
        {"field_f1": 0.5, "edit_distance": 0.1, "json_validity": float("nan"), "exact_match": 0.25},
        {"field_f1": 0.4, "edit_distance": 0.3, "json_validity": 1.0, "key_f1": 1.0},
    )
    line = {row.split()[0]: " ".join(row.split()[1:]) for row in text.splitlines()[2:]}
    assert line["field_f1"] == "0.500 0.400 -0.100 worse"
    assert line["edit_distance"].endswith("0.100 0.300 +0.200 worse")
    assert line["json_validity"] == "nan 1.000 +nan"
    assert line["exact_match"] == "0.250 - -"
    assert line["key_f1"] == "- 1.000 -"


def header_colours(panel: Image.Image, columns: int) -> list[str]:
    """The colour of each column's header, from the right edge of the picture."""
    step = panels.COLUMN_WIDTH + panels.MARGIN
    points = [(panel.width - step * (columns - c) + 3, panels.MARGIN + 3) for c in range(columns)]
    return ["#{:02x}{:02x}{:02x}".format(*panel.getpixel(point)) for point in points]


def count(panel: Image.Image, colour: str) -> int:
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return int((np.asarray(panel) == rgb).all(axis=-1).sum())


def test_panel_shows_document_and_verdicts():
    document = Image.new("RGB", (300, 500), (12, 200, 34))
    panel = prediction_panel(document, TARGET, "WARUNG 1 nasi goreng 12.000", TARGET.replace(", ", " ,"))
    assert panel.mode == "RGB"
    assert header_colours(panel, 3) == [panels.SLATE, panels.RED, panels.GREEN]
    shown = count(panel, "#0cc822")
    assert abs(shown - 420 * 700) < 2000  # 300 x 500 in its own proportions, 420 wide
    assert count(panel, panels.WRONG) == 0

    panel = prediction_panel(document, TARGET, None, TARGET.replace("12.000", "13.000"))
    assert header_colours(panel, 2) == [panels.SLATE, panels.AMBER]
    assert 0 < count(panel, panels.WRONG) < 2 * panels.LINE * panels.COLUMN_WIDTH  # one line of ten


def test_panel_clips_and_says_so():
    long = json.dumps({f"key {i}": "value " * 30 for i in range(500)})
    given = (Image.new("L", (50, 50)), long, "x" * 200_000, "\n" * 5000)
    panel = prediction_panel(*given)
    assert calls_of(prediction_panel, *given) < len(long) + 205_000  # characters, which are not drawn one by one
    assert panel.height == panels.MAX_HEIGHT + 2 * panels.MARGIN
    last_line = panel.crop((0, panel.height - 70, panel.width, panel.height))
    assert count(last_line, panels.MUTED) > 0


@pytest.mark.parametrize("size", [(1, 1), (4000, 1), (1, 4000), (3000, 4000)])
def test_panel_of_any_shape(size):
    panel = prediction_panel(Image.new("RGBA", size), "{}", "", "{}")
    assert panel.height <= panels.MAX_HEIGHT + 2 * panels.MARGIN
    assert panel.width <= 1800


def test_text_that_no_font_has():
    assert panels._readable('{"a": "é€ 中\\ud800 \\u0000"}')[1] == r'  "a": "é€ \u4e2d\ud800 \u0000"'
    assert panels._readable("a\tb\x07\r\n中") == ["a   b\\u0007", "\\u4e2d"]
    prediction_panel(Image.new("RGB", (9, 9)), '{"a": "\u202e\U0001f600"}', "\ud800\uffff", "\x00")


def test_wrapping_keeps_the_text():
    line = '    "address": "' + "LOT 1851-A & 1851-B, JALAN KPB 6 " * 5 + "x" * 100 + '"'
    parts = panels._wrap(line, 40)
    assert max(map(len, parts)) <= 40
    assert "".join(parts).replace(" ", "") == line.replace(" ", "")
    assert all(part.startswith("      ") for part in parts[1:])
    assert panels._wrap(" " * 200 + "x", 40)[-1].endswith("x")


def test_no_torch():
    code = "import sys, im2json.report.picture; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_estimates_lie_where_they_belong():
    found = [Estimate("<8>", 0.5, 0.4, 0.7, [0.45, 0.55]), Estimate("16", None), Estimate("2r", 0.9, None, None)]
    svg = ElementTree.fromstring(estimate_plot(found, "r & alpha", "field_f1"))
    first, last = svg.findall("g")
    mean, *seeds = ([float(c.get(name)) for name in ("cx", "cy")] for c in first.findall("circle"))
    bar = first.find("path").get("d")
    x, low, high = (float(part) for part in bar.split("M")[1].replace("V", " ").split())
    assert x == mean[0] and high < seeds[1][1] < mean[1] < seeds[0][1] < low  # downwards is more
    assert last.find("path") is None
    assert float(last.find("circle").get("cy")) < high and float(last.find("circle").get("cx")) > mean[0]
    assert first.findtext("title") == "<8>: 0.500 [0.400, 0.700]"
    texts = {text.text: float(text.get("x")) for text in svg.findall("text")}
    assert texts["<8>"] < texts["16"] < texts["2r"] and "r & alpha" in texts
    assert {"0.4", "0.5", "0.9"} <= set(texts)
    assert estimate_plot(found[1:2], "r", "field_f1") == ""


def test_labels_of_many_estimates_stay_within_the_plot():
    found = [Estimate(f"a rather long value, number {i}", i / 40) for i in range(40)]
    svg = ElementTree.fromstring(estimate_plot(found, "prompt", "field_f1"))
    tilted = [text for text in svg.findall("text") if "rotate" in text.get("transform", "")]
    assert len(tilted) == 40 and tilted[39].findtext("title") == found[39].label
    places = [float(text.get("x")) for text in tilted]
    assert places[0] > 0.7 * 24 * 6 and places[39] < float(svg.get("width"))
    assert min(b - a for a, b in itertools.pairwise(places)) > 20


def test_curves_go_up_with_their_values():
    curves = [
        Curve("a<b", 0, [(100, 0.2), (200, 0.8)]),
        Curve("once", 8, [(200, 0.5)]),
        Curve("none", 2, [(100, float("nan"))]),
    ]
    svg = ElementTree.fromstring(curve_plot(curves, "step", "field_f1"))
    (line,), (dot,) = svg.findall("polyline"), svg.findall("circle")
    (x, y), (right, top) = ([float(n) for n in point.split(",")] for point in line.get("points").split())
    assert x < right == float(dot.get("cx")) and top < float(dot.get("cy")) < y
    assert (line.findtext("title"), dot.findtext("title")) == ("a<b", "once")
    assert curve_plot(curves[2:], "step", "field_f1") == ""
    names = ElementTree.fromstring(legend(str(i) for i in range(40)))
    styles = {(n.get("stroke"), n.get("stroke-dasharray")) for n in names.iter("line")}
    assert len(styles) == 40


def test_a_logarithmic_scale_gives_each_decade_the_same_room():
    svg = ElementTree.fromstring(
        curve_plot([Curve("loss", 0, [(0, 10.0), (1, 1.0), (2, 0.1), (3, 0.0)])], "step", "loss", True)
    )
    heights = [float(point.split(",")[1]) for point in svg.find("polyline").get("points").split()]
    assert len(heights) == 3 and heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.2)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.91, 0.987), (1, 1), (0, 0), (-3, 12345), (1e-7, 3e-7)])
def test_ticks_are_round_and_enclose_the_values(low, high):
    ticks = round_ticks(low, high)
    assert 2 <= len(ticks) <= 8 and ticks[0] <= low + 1e-12 and ticks[-1] >= high - 1e-12
    assert f"{ticks[1] - ticks[0]:.6e}"[:8] in ("1.000000", "2.000000", "5.000000")
    if low > 0:
        ticks = log_ticks(low, high)
        assert len(ticks) >= 2 and ticks[0] <= low and ticks[-1] >= high


def test_thinned_points_keep_the_mean():
    points = [(float(i), float(i % 7)) for i in range(1000)]
    kept = thinned(points)
    assert len(kept) == 100 and sum(y for _, y in kept) / 100 == pytest.approx(sum(y for _, y in points) / 1000)
    assert thinned(points[:50]) == points[:50]
