"""A run keeps the splits that it began with, whatever becomes of its data; and rows are judged before they are cut."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from helpers import assert_same_runs, clear_error, write_dataset
from PIL import Image, ImageOps

from im2json.data.check import check_split, examine
from im2json.data.receipts import Receipts
from im2json.data.sources import load_splits, open_splits
from im2json.data.splits import RunSplits, divide, restore
from im2json.options import DataOptions
from im2json.records import SplitRecord
from im2json.runs import RunFolder


@pytest.fixture
def data(tmp_path) -> Path:
    return write_dataset(tmp_path / "data")


@pytest.fixture
def one_split(tmp_path) -> Path:
    """20 rows of train, from which validation and test are cut."""
    folder = write_dataset(tmp_path / "one", train=20)
    for name in ("validation", "test"):
        shutil.rmtree(folder / name)
    return folder


def opened(folder: Path) -> Any:
    return open_splits(DataOptions(str(folder)), []).values()


def begun(folder: Path, **more: Any) -> RunSplits:
    """Return the splits of a run that begins on a folder."""
    return divide(check_split(*opened(folder)), str(folder), [], **more)


def restored(folder: Path, record: SplitRecord) -> RunSplits:
    """Return the splits of a run that has begun."""
    return restore(record, examine(opened(folder)))


def listing(found: RunSplits) -> dict[str, list[tuple[str, Any]]]:
    """Return ids and targets by split, in order."""
    return {name: list(zip(split.ids, split.targets)) for name, split in found.splits.items()}


def pictures(found: RunSplits) -> dict[str, list[bytes]]:
    return {name: [split[i].image.tobytes() for i in range(len(split))] for name, split in found.splits.items()}


def rows(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / split / "metadata.jsonl").read_text().splitlines()]


def write_rows(folder: Path, rows: list[dict[str, Any]], split: str = "train") -> None:
    (folder / split / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def add(folder: Path, count: int, split: str = "train", at: int = 0) -> None:
    """Add rows to a split, before its row `at`."""
    added = []
    for i in range(count):
        name = f"added-{split}-{i}.png"
        Image.new("RGB", (20, 24), (i, 10, len(split))).save(folder / split / name)
        added.append({"file_name": name, "ground_truth": {"added": str(i)}})
    present = rows(folder, split)
    write_rows(folder, [*present[:at], *added, *present[at:]], split)


def invert(path: Path) -> None:
    ImageOps.invert(Image.open(path)).save(path)


# --- the record


def test_splits_json_can_be_checked_by_hand(finished, dataset):
    stored = json.loads(finished.splits.read_text("utf-8"))
    assert list(stored) == ["train", "validation", "test", "left_out"]
    assert [len(part) for part in stored.values()] == [10, 4, 3, 0]
    picture = hashlib.sha256((Path(dataset) / "train" / "3.png").read_bytes()).hexdigest()
    target = json.loads(rows(Path(dataset))[3]["ground_truth"])["gt_parse"]
    text = json.dumps(target, separators=(",", ":"))
    assert stored["train"]["train/3.png"] == f"{picture[:16]} {hashlib.sha256(text.encode()).hexdigest()[:16]}"


@pytest.mark.parametrize("text", ["{", "[]", '{"train": {}}', '{"train": {"a": 3}, "validation": {}, "test": {}}'])
def test_a_record_that_no_run_writes_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "splits.json").write_text(text)
    with pytest.raises(ValueError, match=r"splits\.json.* (is not JSON|does not hold a run's splits)") as error:
        RunFolder(tmp_path).read_splits()
    assert "\n" not in str(error.value)


def test_receipts_are_recorded_without_drawing_one(monkeypatch):
    monkeypatch.setattr("im2json.data.receipts.render", None)
    splits = [Receipts("train", 6), Receipts("validation", 2), Receipts("test", 3)]
    found = divide(examine(splits), "receipts", [])
    contents = {content for contents in found.record.splits.values() for content in contents.values()}
    assert len({content.picture for content in contents}) == len({content.target for content in contents}) == 11
    assert listing(restore(found.record, examine(splits))) == listing(found)


# --- what may happen to the data


def rename(folder: Path) -> None:
    changed = rows(folder)
    for row in changed:
        (folder / "train" / row["file_name"]).rename(folder / "train" / f"new-{row['file_name']}")
        row["file_name"] = f"new-{row['file_name']}"
    write_rows(folder, changed)


def give_test_to_train(folder: Path) -> None:
    moved = rows(folder, "test")
    for row in moved:
        (folder / "test" / row["file_name"]).rename(folder / "train" / f"t{row['file_name']}")
        row["file_name"] = f"t{row['file_name']}"
    shutil.rmtree(folder / "test")
    write_rows(folder, [*moved, *rows(folder)])


def store_as_table(folder: Path) -> None:
    """The same pictures and targets as a table, whose rows are known by their numbers."""
    columns: dict[str, list] = {"image": [], "ground_truth": []}
    for row in reversed(rows(folder)):
        columns["image"].append({"path": None, "bytes": (folder / "train" / row["file_name"]).read_bytes()})
        columns["ground_truth"].append(row["ground_truth"])
    shutil.rmtree(folder / "train")
    for name in ("validation", "test"):
        for row in rows(folder, name):
            columns["image"].append({"path": None, "bytes": (folder / name / row["file_name"]).read_bytes()})
            columns["ground_truth"].append(row["ground_truth"])
        shutil.rmtree(folder / name)
    datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()).save_to_disk(str(folder))


@pytest.mark.parametrize(
    ("change", "added"),
    [
        (lambda folder: add(folder, 3), 3),
        (lambda folder: add(folder, 2, "test", at=1), 2),
        (lambda folder: write_rows(folder, rows(folder)[::-1]), 0),
        (rename, 0),
        (give_test_to_train, 0),
        (store_as_table, 0),
    ],
    ids=["added to train", "added to test", "reversed", "renamed", "moved to train", "stored as a table"],
)
def test_examples_stay_in_their_splits_in_their_order_under_their_ids(data, change, added):
    before = begun(data)
    record = SplitRecord.from_json(json.loads(json.dumps(before.record.to_json())), "splits.json")
    seen = pictures(before)
    change(data)
    found = restored(data, record)
    assert (listing(found), pictures(found)) == (listing(before), seen)
    assert (found.added, [fates for fates in found.lost.values() if fates]) == (added, [])
    assert found.splits["test"][0].id == before.splits["test"].ids[0]


def test_what_became_of_each_lost_example_is_said(data):
    record = begun(data).record
    invert(data / "train" / "1.png")
    (data / "train" / "4.png").write_bytes(b"no picture")
    changed = rows(data)
    changed[2]["ground_truth"] = {"total": "74,00"}
    write_rows(data, [row for row in changed if row["file_name"] != "7.png"])
    invert(data / "test" / "2.png")
    write_rows(data, [{**row, "ground_truth": {}} for row in rows(data, "test")], "test")
    found = restored(data, record)
    fates = found.lost["train"]
    assert list(fates) == ["train/1.png", "train/2.png", "train/4.png", "train/7.png"]
    assert fates["train/1.png"] == "its picture changed"
    assert fates["train/2.png"] == "its target changed"
    assert "4.png: is not a picture" in fates["train/4.png"]
    assert fates["train/7.png"] == "is gone"
    assert found.lost["test"]["test/2.png"] == "its picture and target changed"
    assert [len(split) for split in found.splits.values()] == [6, 4, 0]


# --- nothing that is trained on is tested on


def test_a_row_of_train_is_left_out_of_test(data):
    shutil.copy(data / "train" / "3.png", data / "test" / "same.png")
    shutil.copy(data / "train" / "4.png", data / "test" / "other.png")
    same = {**rows(data)[3], "file_name": "same.png"}
    other = {"file_name": "other.png", "ground_truth": {"another": "target"}}
    write_rows(data, [same, *rows(data, "test"), other], "test")
    found = begun(data)
    assert found.splits["test"].ids == ["test/0.png", "test/1.png", "test/2.png", "test/other.png"]
    assert list(found.left_out) == ["test/same.png"]
    again = restored(data, found.record)
    assert listing(again) == listing(found) and again.added == 0
    for notes in (found.notes(), again.notes()):
        assert "rows left out of the test split, because they are trained on: 1\n  test/same.png" in notes
        assert any(note.startswith("pictures in more than one split, which flatters scores: 1\n") for note in notes)


def test_rows_of_one_picture_with_different_targets_are_named(data):
    first, second, *others = rows(data, "test")
    write_rows(data, [first, second, {**second, "ground_truth": first["ground_truth"]}, *others], "test")
    ids = [f"test/{second['file_name']}", f"test/{second['file_name']}#2"]
    title = "rows of one split with the same picture and different targets: 2"
    assert [title, *ids] in [[line.strip() for line in note.splitlines()] for note in begun(data).notes()]
    write_rows(data, [first, second, second, *others], "test")
    assert not any("different targets" in note for note in begun(data).notes())


def test_rows_that_the_adapter_was_trained_on_are_left_out_of_test(data):
    contents = begun(data).record.splits
    learned = {contents["test"]["test/1.png"], contents["validation"]["validation/0.png"]}
    found = divide(examine(opened(data)), str(data), notes := [], learned)
    assert found.splits["test"].ids == ["test/0.png", "test/2.png"]
    assert len(found.splits["validation"]) == 4
    assert "validation examples that --adapter was trained on, which flatters scores: 1" in notes


# --- rows are judged before splits are cut


def test_bad_rows_are_named_before_the_cut(cli, one_split, base_args, tmp_path):
    """All rows on one line are one bad row, not one picture too few."""
    lines = one_split / "train" / "metadata.jsonl"
    lines.write_text(" ".join(lines.read_text().splitlines()))
    flags = ("--dataset", one_split, "--output")
    refused = cli("train", *base_args, *flags, tmp_path / "run")
    assert refused.exit_code == 1 and "1 of 1 rows cannot be used" in refused.stderr
    assert f"{lines}:1: is not JSON" in refused.stderr and "too few" not in refused.stderr
    checked = cli("train", "--check", *flags, tmp_path / "page.html")
    assert checked.exit_code == 1
    assert f"bad rows: 1 of 1\n  {lines}:1: is not JSON" in checked.stdout
    assert clear_error(checked).endswith("too few to cut it from; at least 3 are needed")


def test_only_good_rows_are_cut(one_split):
    """Without its bad row, a data set is cut as if the row had never been there."""
    wanted = listing(begun(one_split))
    write_rows(one_split, [{"file_name": "nowhere.png", "ground_truth": {}}, *rows(one_split)])
    found = divide(check_split(*opened(one_split), skip_bad=1), str(one_split), [])
    assert listing(found) == wanted
    assert [len(split) for split in found.splits.values()] == [16, 2, 2]
    shutil.rmtree(one_split / "train")
    write_dataset(one_split / "few", train=3, validation=0, test=0)
    (one_split / "few" / "train").rename(one_split / "train")
    shutil.rmtree(one_split / "few")
    write_rows(one_split, [{"file_name": "nowhere.png", "ground_truth": {}}, *rows(one_split)])
    found = divide(check_split(*opened(one_split), skip_bad=1), str(one_split), [])
    assert [len(split) for split in found.splits.values()] == [1, 1, 1]


def test_a_run_begins_with_the_splits_that_load_splits_returns(one_split):
    splits = load_splits(str(one_split))
    assert {name: list(split.ids) for name, split in splits.items()} == {
        name: split.ids for name, split in begun(one_split).splits.items()
    }


# --- runs


SHORT = ("--no-test", "--max-new-tokens", 3, "--eval-batch-size", 4)


@pytest.fixture
def evaluated(cli) -> Callable[..., tuple[list[str], str]]:
    """`evaluated(run, *flags)` evaluates a run, and returns the ids of the test split that it scores, and its notes."""

    def run(folder: RunFolder, *flags: object) -> tuple[list[str], str]:
        done = cli("evaluate", folder.path, *flags)
        assert done.exit_code == 0, done.output
        return [row.id for row in folder.predictions("test", "after")], done.stderr

    return run


def test_a_run_whose_data_grew_goes_on_and_is_scored_as_if_they_had_not(train, resume, evaluated, one_split, tmp_path):
    flags = ("--dataset", one_split, *SHORT)
    whole = train(tmp_path / "whole", *flags)
    run = train(tmp_path / "run", *flags, "--stop-after", 2)
    record = run.read_splits()
    add(one_split, 30)
    assert_same_runs(resume(run), whole)
    ids, said = evaluated(run)
    assert ids == list(record.splits["test"]) and run.read_splits() == record
    assert "rows ignored, because they were added since the run began: 30" in said
    assert set(ids) & set(record.splits["train"]) == set()


def test_a_run_whose_data_changed_does_not_go_on_but_is_scored_on_what_is_left(train, cli, evaluated, data, tmp_path):
    run = train(tmp_path / "run", "--dataset", data, *SHORT, "--steps", 1)
    for i in range(7):
        invert(data / "train" / f"{i}.png")
    error = clear_error(cli("train", "--resume", run.path, "--steps", 2))
    assert "its data changed since it began (7 of 17 examples): train/0.png (its picture changed), " in error
    assert "train/4.png (its picture changed) and 2 more; put" in error and str(data) in error
    assert run.done and run.read_config().train.steps == 1
    invert(data / "test" / "1.png")
    ids, said = evaluated(run)
    assert ids == ["test/0.png", "test/2.png"]
    assert "examples left out, because they changed or are gone since the run began: 8" in said
    shutil.rmtree(data / "test")
    refused = cli("evaluate", run.path)
    assert "no example of its test split is what it was" in clear_error(refused)
    assert "reading the data set" in said and "loading the model" in said
    assert "reading the data set" in refused.stderr and "loading the model" not in refused.stderr


def test_a_run_without_a_record_says_so_and_goes_on(train, cli, evaluated, data, tmp_path):
    run = train(tmp_path / "run", "--dataset", data, *SHORT, "--steps", 1)
    run.splits.unlink()
    ids, said = evaluated(run)
    assert len(ids) == 3
    assert "was begun by an older version, which kept no splits.json" in said
    done = cli("train", "--resume", run.path, "--steps", 2)
    assert done.exit_code == 0, done.output
    assert "was begun by an older version, which kept no splits.json" in done.output


def test_a_run_from_an_adapter_is_not_tested_on_what_the_adapter_was_trained_on(train, cli, base_args, data, tmp_path):
    flags = ("--dataset", data, *SHORT, "--steps", 1, "--eval-every", 0)
    first = train(tmp_path / "first", *flags)
    moved = rows(data)[5]
    write_rows(data, [row for row in rows(data) if row != moved])
    shutil.copy(data / "train" / "5.png", data / "test" / "moved.png")
    write_rows(data, [*rows(data, "test"), {**moved, "file_name": "moved.png"}], "test")
    second = train(tmp_path / "second", *flags, "--adapter", first.path)
    third = train(tmp_path / "third", *flags, "--adapter", second.adapter)
    for run in (second, third):
        assert list(run.read_splits().left_out) == ["test/moved.png"]
        assert list(run.read_splits().splits["test"]) == ["test/0.png", "test/1.png", "test/2.png"]
    first.splits.unlink()
    done = cli("train", *base_args, *flags, "--adapter", third.path, "--output", tmp_path / "fourth")
    assert f"--adapter {first.path}: no splits.json says what it was trained on" in done.output
    assert len(RunFolder(tmp_path / "fourth").read_splits().splits["test"]) == 4


def test_a_test_split_of_training_rows_alone_is_refused(cli, base_args, data, tmp_path):
    shutil.rmtree(data / "test")
    shutil.copytree(data / "train", data / "test")
    flags = [*base_args, "--dataset", data, "--output", tmp_path / "run", "--steps", 1, "--eval-every", 0]
    error = clear_error(cli("train", *flags))
    assert "every row of the test split has the picture and target of one that is trained on" in error
    assert cli("train", *flags, "--no-test").exit_code == 0
    assert len(RunFolder(tmp_path / "run").read_splits().left_out) == 10


# --- the end of a run that goes on


def test_a_run_is_not_resumed_to_an_end_that_it_has_passed(train, cli, tmp_path):
    run = train(tmp_path / "run", *SHORT, "--steps", 9, "--stop-after", 4)
    stored = json.loads(run.config.read_text())
    stored["options"] |= {"steps": None, "epochs": 3.0}
    run.config.write_text(json.dumps(stored))
    error = clear_error(cli("train", "--resume", run.path, "--epochs", 1))
    assert error.endswith("--epochs 1 (3 steps) is less than the 4 steps that the run has taken")
    assert not run.done and run.read_stored()["changes"] == []


@pytest.mark.parametrize("every", [2, 3])
def test_a_run_that_is_to_end_where_it_stands_is_evaluated_there_once(train, resume, tmp_path, every):
    run = train(tmp_path / "run", *SHORT, "--steps", 6, "--stop-after", 4, "--eval-every", every)
    resume(run, "--steps", 4)
    assert [line.step for line in run.log("validation")] == ([2, 4] if every == 2 else [3, 4])
    assert run.read_result().step == 4
