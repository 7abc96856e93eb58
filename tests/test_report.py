"""Tables and pictures as a person sees them."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from im2json.report import before_after_table, table
from im2json.report import picture as panels
from im2json.report.picture import prediction_panel

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
    start = time.perf_counter()
    panel = prediction_panel(Image.new("L", (50, 50)), long, "x" * 200_000, "\n" * 5000)
    assert time.perf_counter() - start < 5
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
