"""Every row is looked at before the first step: bad rows, copies, and what train.py --check says of a data set."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from helpers import clear_error, write_dataset
from PIL import Image

from im2json.data.check import check_split
from im2json.data.sources import open_splits
from im2json.data.splits import divide
from im2json.files import read_lines
from im2json.options import DataOptions
from im2json.runs import RunFolder


@pytest.fixture
def data(tmp_path) -> Path:
    return write_dataset(tmp_path / "data")


def checked(folder: Path, skip_bad: int = 0):
    """Return the splits that a run on a folder would begin with."""
    splits = open_splits(DataOptions(str(folder)), notes := [])
    return divide(check_split(*splits.values(), skip_bad=skip_bad), str(folder), notes)


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
    assert [[row.id for row in group] for group in found.checkup.copies] == [
        ["train/3.png", "validation/copy.tiff", "test/copy.bmp"],
        ["train/6.png", "train/copy.bmp"],
    ]
    between = found.checkup.copies_between(found.splits)
    assert between == ["train/3.png (train) = validation/copy.tiff (validation) = test/copy.bmp (test)"]
    assert found.checkup.copies_within(found.splits) == {"train": 1}
    note, few = found.notes()
    assert few == "too few rows for scores that say much about others: 4 in test"
    assert note.startswith("pictures in more than one split, which flatters scores: 1\n  train/3.png (train) = ")


def test_one_pixel_makes_another_picture(data):
    """Of pictures that agree wherever a sample is taken, every pixel is compared."""
    for name, dot in (("a", 0), ("b", 0), ("c", 1)):
        page = Image.new("RGB", (1000, 1000), "white")
        page.putpixel((501, 500 + dot), (0, 0, 0))
        page.save(data / "train" / f"{name}.png")
        with (data / "train" / "metadata.jsonl").open("a") as file:
            file.write(json.dumps({"file_name": f"{name}.png", "ground_truth": {}}) + "\n")
    assert [[row.id for row in group] for group in checked(data).checkup.copies] == [["train/a.png", "train/b.png"]]


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
    note, few = found.notes()
    assert few == "too few rows for scores that say much about others: 4 in validation, 2 in test"
    assert note.splitlines()[0] == "rows left out, because they are bad: 2 of 17"
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
    assert "rows left out, because they are bad: 1 of 18" in result.output
    assert "train/3.png (train) = test/copy.bmp (test)" in result.output
    ids = {row["id"] for row in read_lines(RunFolder(tmp_path / "run").predictions_file)}
    assert ids == {"test/1.png", "test/2.png", "test/copy.bmp"}
    assert RunFolder(tmp_path / "run").read_config().data.letterbox
    again = cli("evaluate", tmp_path / "run")
    assert again.exit_code == 0, again.output
    assert "rows left out, because they are bad: 1 of 18" in again.stderr


def clear_first_line(result) -> str:
    assert result.exit_code == 1
    return next(line for line in result.stderr.splitlines() if line.startswith("Error: "))


# --- train.py --check


@pytest.fixture
def check(cli, small_model, tmp_path):
    """`check(*flags)` runs train.py --check and returns what it printed and the page's text."""

    def run(*flags: object, status: int = 0) -> tuple[str, str]:
        page = tmp_path / "pages" / "page.html"
        result = cli("train", "--check", "--model", small_model, "--output", page, *flags)
        assert result.exit_code == status, result.output
        assert f"preview  {page}" in result.output
        return result.output, page.read_text("utf-8")

    return run


def test_check_tells_what_the_data_holds(check, data):
    add_copy(data, "train/3.png", "test/copy.bmp")
    add_copy(data, "train/4.png", "train/copy.bmp")
    said, _ = check("--dataset", data)
    rows = {line.split()[0]: line.split()[1:] for line in said.splitlines() if line.strip()}
    assert "pictures in more than one split: 1\n  train/3.png (train) = test/copy.bmp (test)" in said
    assert re.search(r"^train +11 +0 +1$", said, re.M)
    assert re.search(r"^test +4 +0 +0$", said, re.M)
    assert rows["menu"] == rows["menu.nm"] == rows["total"] == ["0.895"]  # 17 of 19
    assert rows["copy"] == ["0.105"]
    assert "bad rows" not in said


def test_check_says_what_it_reads_before_all_else(check, data, monkeypatch):
    monkeypatch.chdir(data.parent)
    assert check("--dataset", data)[0].startswith("reading the data set data\n")


@pytest.mark.parametrize("prompt", ["extract JSON.", "<image>"])
def test_check_says_what_it_knows_without_the_model_first(cli, data, small_model, tmp_path, prompt):
    """The model is out of reach, or refuses the prompt."""
    spoil(data, "train/2.png")
    model = tmp_path / "nowhere" if prompt == "extract JSON." else small_model
    flags = ("--output", tmp_path / "page.html", "--prompt", prompt)
    result = cli("train", "--check", "--model", model, "--dataset", data, *flags)
    assert result.exit_code == 1
    assert re.search(r"^train +9 +1 +0$", result.stdout, re.M)
    assert "bad rows: 1 of 17" in result.stdout and re.search(r"^menu.nm +1\.000$", result.stdout, re.M)
    assert "tokens" not in result.stdout and not (tmp_path / "page.html").exists()
    (error,) = result.stderr.splitlines()
    assert error.startswith(f"Error: --model {model}: no such folder" if model != small_model else "Error: --prompt")


def test_check_is_a_command_of_its_own(cli, check, small_model, data, tmp_path):
    said, _ = check("--dataset", data)
    flags = ("--model", small_model, "--dataset", data, "--output", tmp_path / "pages" / "page.html")
    result = cli("im2json.app", "check", *flags)
    assert (result.exit_code, result.output) == (0, said)


def test_check_finds_the_longest_target(check, data):
    metadata = data / "train" / "metadata.jsonl"
    lines = metadata.read_text().splitlines()
    lines[6] = json.dumps({"file_name": "6.png", "ground_truth": {"total": "9" * 90}})
    metadata.write_text("\n".join(lines))
    said, _ = check("--dataset", data)
    assert "longest of train: train/6.png" in said and "bad rows" not in said


def test_check_lists_every_bad_row_and_its_status_says_so(check, data):
    names = [f"train/{i}.png" for i in range(9)]
    spoil(data, *names, *(f"validation/{i}.png" for i in range(4)))
    said, page = check("--dataset", data, status=1)
    assert "bad rows: 13 of 17" in said
    for name in names:
        assert f"  {data / name}: is not a picture" in said
    assert "train/9.png" in page
    check("--dataset", data, "--skip-bad", 13, status=1)  # nothing is left of validation
    write_dataset(data.parent / "other")
    spoil(data.parent / "other", *names)
    check("--dataset", data.parent / "other", "--skip-bad", 8, status=1)
    check("--dataset", data.parent / "other", "--skip-bad", 9)


def test_the_page_shows_where_the_labels_start(check, data):
    metadata = data / "train" / "metadata.jsonl"
    lines = metadata.read_text().splitlines()
    lines[0] = json.dumps({"file_name": "0.png", "ground_truth": {"nm": "<b>&é"}})
    metadata.write_text("\n".join(lines))
    _, page = check("--dataset", data, "--prompt", "read it")
    assert "<b>" not in page
    assert "http" not in page and 'src="data:image/jpeg;base64,' in page  # nothing from outside
    assert page.count("<section>") == 6
    section = page[page.index("<section>") : page.index("</section>")]
    tokens = re.findall(r"<span( class=learned)?>(.*?)</span>", section, re.S)
    given = "".join(text for learned, text in tokens if not learned)
    learned = "".join(text for learned, text in tokens if learned)
    assert re.fullmatch(r"&lt;image&gt; x \d+&lt;bos&gt;read it\n", given)
    assert learned == "{&quot;nm&quot;:&quot;&lt;b&gt;&amp;&lt;0xC3&gt;&lt;0xA9&gt;&quot;}&lt;eos&gt;"
    assert [bool(flag) for flag, _ in tokens] == sorted(bool(flag) for flag, _ in tokens)


def test_check_trains_nothing_and_names_its_page(cli, small_model, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = cli("train", "--check", "--model", small_model, "--dataset", data)
    assert result.exit_code == 0, result.output
    assert "preview  runs/data-check.html" in result.output
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["data-check.html"]


def test_check_of_nothing_is_one_clear_line(cli, tmp_path):
    assert "there is no such folder" in clear_error(cli("train", "--check", "--dataset", tmp_path / "nowhere"))
    for flags in (("--resume", tmp_path), ("--stop-after", 5)):
        result = cli("train", "--check", *flags)
        assert result.exit_code == 2
        assert "not with --resume or --stop-after" in result.output


def test_files_of_several_pages_are_named(check, data):
    first, second = (Image.open(data / "train" / f"{i}.png").copy() for i in (1, 2))
    first.save(data / "train" / "0.png", "TIFF", save_all=True, append_images=[second, first])
    first.save(data / "test" / "1.png", "GIF", save_all=True, append_images=[second])
    note = "files with several pages, of which the first is read: 2\n  train/0.png: 3 pages\n  test/1.png: 2 pages"
    assert note in checked(data).notes()
    said, _ = check("--dataset", data)
    assert note in said


def test_pictures_that_had_to_be_scaled_are_named(check, data):
    Image.fromarray(np.full((9, 9), 4000, np.uint16)).save(data / "train" / "0.png")
    how = "its values go up to 4000, and 4095 is taken for white"
    note = f"pictures of more than 8 bits that use a part of their range: 1\n  train/0.png: {how}"
    assert note in checked(data).notes()
    said, _ = check("--dataset", data)
    assert note in said
