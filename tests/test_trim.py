"""Scans cut to their printed area."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers import write_dataset
from PIL import Image, ImageDraw
from small_model import save_small_chat

from im2json.data.trim import printed_box, printed_rows, trimmed
from im2json.families import open_collator


def page(size: tuple[int, int] = (1240, 1754), paper: int = 240, at: tuple[int, int] = (400, 200)) -> Image.Image:
    """A scan of 20 lines of 260 x 14 pixels, 40 apart, whose paper gets darker to the right."""
    shade = np.linspace(0, 30, size[0])[None].repeat(size[1], 0)
    picture = Image.fromarray((paper - shade).astype(np.uint8)).convert("RGB")
    draw = ImageDraw.Draw(picture)
    left, top = at
    for line in range(20):
        for letter in range(13):
            x, y = left + 20 * letter, top + 40 * line
            draw.rectangle((x, y, x + 12, y + 14), fill=(30, 30, 30))
    return picture


PRINT = (400, 200, 400 + 20 * 12 + 12, 200 + 40 * 19 + 14)


@pytest.mark.parametrize("paper", [250, 200, 150])
def test_a_page_is_cut_to_what_is_printed(paper):
    left, top, right, bottom = printed_box(page(paper=paper))
    assert left <= PRINT[0] and top <= PRINT[1] and right >= PRINT[2] and bottom >= PRINT[3]
    border = 0.1 * max(PRINT[2] - PRINT[0], PRINT[3] - PRINT[1])
    assert left > PRINT[0] - border and top > PRINT[1] - border
    assert right < PRINT[2] + border and bottom < PRINT[3] + border


def test_what_has_no_print_stays_whole():
    blank = Image.new("RGB", (300, 400), (230, 230, 220))
    for how in ("off", "crop", "squeeze"):
        assert trimmed(blank, how) is blank
    assert trimmed(page(), "off").size == (1240, 1754)


def test_three_of_four_blank_rows_are_left_out_and_no_printed_one():
    cut, squeezed = trimmed(page(), "crop"), trimmed(page(), "squeeze")
    printed = printed_rows(cut)
    assert squeezed.width == cut.width
    assert squeezed.height == pytest.approx(printed.sum() + (~printed).sum() / 4, abs=1)
    dark = [int((np.asarray(each.convert("L")) < 100).sum()) for each in (page(), cut, squeezed)]
    assert dark[0] == dark[1] == dark[2]  # every pixel of print is still there


def test_a_rule_down_the_page_does_not_make_its_rows_printed():
    ruled = page()
    ImageDraw.Draw(ruled).line((380, 150, 380, 1020), fill=(30, 30, 30), width=3)
    assert printed_rows(trimmed(ruled, "crop")).mean() < 0.75


@pytest.mark.parametrize("size", [(1, 1), (3, 900), (900, 3), (9, 9)])
def test_the_smallest_pictures_are_taken(size):
    picture = Image.new("RGB", size, "white")
    picture.putpixel((0, 0), (0, 0, 0))
    for how in ("crop", "squeeze"):
        assert min(trimmed(picture, how).size) >= 1


def test_every_family_sees_the_printed_area(small_model, tmp_path):
    scan = page()
    for model in (small_model, str(save_small_chat(tmp_path / "chat"))):
        for how in ("crop", "squeeze"):
            plain, trimming = open_collator(model, "read."), open_collator(model, "read.", trim=how)
            wanted = plain.pictures([trimmed(scan, how)])
            for name, value in trimming.pictures([scan]).items():
                assert value.equal(wanted[name])


def test_trimming_is_kept_with_the_adapter_and_shown_by_check(cli, base_args, tmp_path):
    data = write_dataset(tmp_path / "data")
    for number, file in enumerate(sorted(data.glob("*/*.png"))):
        page((620, 877), at=(200 + number, 100)).save(file)
    flags = [*base_args, "--dataset", data, "--trim", "crop"]
    done = cli("train", *flags, "--steps", 1, "--no-test", "--output", tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "run" / "adapter" / "im2json.json").read_text())["trim"] == "crop"
    shown = cli(
        "train",
        "--check",
        "--dataset",
        data,
        "--model",
        base_args[1],
        "--trim",
        "crop",
        "--output",
        tmp_path / "p.html",
    )
    assert shown.exit_code == 0, shown.stdout
    assert "--trim crop cuts 17 of 17 pictures, to" in shown.stdout
