"""Every row is looked at before the first step: bad rows and copies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import write_dataset
from PIL import Image

from im2json.data.check import check_split
from im2json.data.sources import load_splits
from im2json.runs import RunFolder, read_lines


@pytest.fixture
def data(tmp_path) -> Path:
    return write_dataset(tmp_path / "data")


def checked(folder: Path, skip_bad: int = 0):
    return check_split(*load_splits(str(folder)).values(), skip_bad=skip_bad)


def add_copy(folder: Path, source: str, copy: str) -> None:
    """The same pixels in another file format, with another target."""
    Image.open(folder / source).save(folder / copy)
    path = folder / copy
    with (path.parent / "metadata.jsonl").open("a") as file:
        file.write(json.dumps({"file_name": path.name, "ground_truth": {"copy": copy}}) + "\n")


def spoil(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_text("I am a text")


# --- copies


def test_copies_are_found_by_their_pixels(data):
    add_copy(data, "train/3.png", "test/copy.bmp")
    add_copy(data, "train/3.png", "validation/copy.tiff")
    add_copy(data, "train/5.png", "train/copy.webp")  # lossy: another picture
    add_copy(data, "train/6.png", "train/copy.bmp")
    found = checked(data)
    assert found.copies == [
        [("train", "train/3.png"), ("validation", "validation/copy.tiff"), ("test", "test/copy.bmp")],
        [("train", "train/6.png"), ("train", "train/copy.bmp")],
    ]
    assert found.copies_between() == ["train/3.png (train) = validation/copy.tiff (validation) = test/copy.bmp (test)"]
    assert found.copies_within() == {"train": 1}
    (note,) = found.notes()
    assert note.startswith("pictures in more than one split, which flatters scores: 1\n  train/3.png (train) = ")


def test_one_pixel_makes_another_picture(data):
    """Of pictures that agree wherever a sample is taken, every pixel is compared."""
    for name, dot in (("a", 0), ("b", 0), ("c", 1)):
        page = Image.new("RGB", (1000, 1000), "white")
        page.putpixel((501, 500 + dot), (0, 0, 0))
        page.save(data / "train" / f"{name}.png")
        with (data / "train" / "metadata.jsonl").open("a") as file:
            file.write(json.dumps({"file_name": f"{name}.png", "ground_truth": {}}) + "\n")
    assert checked(data).copies == [[("train", "train/a.png"), ("train", "train/b.png")]]


# --- rows that are left out


def test_up_to_so_many_bad_rows_are_left_out(data):
    spoil(data, "train/3.png", "test/0.png")
    with pytest.raises(ValueError, match=r"2 of 17 rows cannot be used: .*--skip-bad 2"):
        checked(data, skip_bad=1)
    found = checked(data, skip_bad=2)
    assert {name: len(split) for name, split in found.splits.items()} == {"train": 9, "validation": 4, "test": 2}
    train = found.splits["train"]
    assert train.ids == [f"train/{i}.png" for i in range(10) if i != 3]
    assert [e.target for e in (train[i] for i in range(9))] == train.targets
    assert train.targets[3]["total"] == "148"
    (note,) = found.notes()
    assert note.splitlines()[0] == "rows left out (--skip-bad): 2 of 17"
    assert [line.strip().split(": ")[0] for line in note.splitlines()[1:]] == [
        str(data / "train/3.png"), str(data / "test/0.png"),
    ]  # fmt: skip


def test_a_split_of_bad_rows_alone_is_refused(data):
    spoil(data, *(f"test/{i}.png" for i in range(3)))
    with pytest.raises(ValueError, match=r"of split test no row can be used:\n.*test/0\.png"):
        checked(data, skip_bad=5)


def test_a_run_says_what_it_left_out_and_what_is_there_twice(cli, base_args, data, tmp_path):
    spoil(data, "test/0.png")
    add_copy(data, "train/3.png", "test/copy.bmp")
    flags = [*base_args, "--dataset", data, "--output", tmp_path / "run", "--steps", 1, "--eval-every", 0]
    assert "1 of 18 rows cannot be used" in clear_first_line(cli("train", *flags))
    result = cli("train", *flags, "--skip-bad", 1, "--letterbox")
    assert result.exit_code == 0, result.output
    assert "rows left out (--skip-bad): 1 of 18" in result.output
    assert "train/3.png (train) = test/copy.bmp (test)" in result.output
    ids = {row["id"] for row in read_lines(RunFolder(tmp_path / "run").predictions)}
    assert ids == {"test/1.png", "test/2.png", "test/copy.bmp"}
    assert RunFolder(tmp_path / "run").read_config().data.letterbox
    again = cli("evaluate", tmp_path / "run")
    assert again.exit_code == 0, again.output
    assert "rows left out (--skip-bad): 1 of 18" in again.stderr


def clear_first_line(result) -> str:
    assert result.exit_code == 1
    return next(line for line in result.stderr.splitlines() if line.startswith("Error: "))
