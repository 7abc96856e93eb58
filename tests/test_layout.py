"""Folders as people have them: the one that was named, with the splits it has, and nothing left out in silence."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path

import datasets
import pytest
from helpers import lock_folder
from PIL import Image

from im2json.data.check import check_split
from im2json.data.sources import load_splits
from im2json.data.splitnames import SplitName, split_named
from im2json.errors import UserError

NAMES = [
    "a[1]",
    "a*",
    "a?",
    "{a,b}",
    "~nobody",
    " a b ",
    "a#b",
    "50%",
    "-a",
    "a:b",
    "a::b",
    "é",
    os.fsdecode(b"a\xe9\xff"),
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


colours = iter(range(10**6))


def picture_bytes() -> bytes:
    """A picture unlike all others."""
    number, stream = next(colours), io.BytesIO()
    Image.new("RGB", (4, 3), (number % 256, number // 256 % 256, 7)).save(stream, "PNG")
    return stream.getvalue()


def write_pictures(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture_bytes())


def write_rows(file: Path, *names: str, pictures: bool = True) -> None:
    """Lines that name pictures, and these pictures, each with its path as its target."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"file_name": name, "target": {"n": name}}) + "\n" for name in names))
    if pictures:
        write_pictures(file.parent, *(name.replace("\\", "/") for name in names))


def write_pairs(root: Path, **folders: str) -> None:
    """Pairs by name: the folder of the picture, and that of the .json if it is another one after a colon."""
    for name, where in folders.items():
        picture, _, target = where.partition(":")
        write_pictures(root, f"{picture}/{name}.png")
        (root / (target or picture)).mkdir(parents=True, exist_ok=True)
        (root / (target or picture) / f"{name}.json").write_text(json.dumps({"n": name}))


def table(names: list[str]) -> datasets.Dataset:
    return datasets.Dataset.from_dict(
        {
            "image": [{"bytes": picture_bytes(), "path": None} for _ in names],
            "target": [json.dumps({"n": name}) for name in names],
        },
        features=datasets.Features({"image": datasets.Image(), "target": datasets.Value("string")}),
    )


def write_parquet(root: Path, **files: int) -> None:
    """Files of so many rows, whose targets tell the file; __ stands for a slash and _of_ for -of-."""
    for key, count in files.items():
        name = key.replace("__", "/").replace("_of_", "-of-")
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        with (root / f"{name}.parquet").open("wb") as file:
            table([f"{name}{i}" for i in range(count)]).to_parquet(file)


def loaded(dataset: Path | str, **options: str) -> tuple[dict[str, list[str]], list[str]]:
    """The targets of each split in order, every row of which can be read, and the notes."""
    notes: list[str] = []
    splits = load_splits(str(dataset), notes=notes, **options)
    check_split(*splits.values())
    return {name: sorted(target["n"] for target in split.targets) for name, split in splits.items()}, notes


# --- the folder that was named


def write_form(root: Path, form: str, names: list[str]) -> Path:
    """Three examples in one of the forms that a data set has; what --dataset names."""
    root.mkdir(parents=True)
    if form == "imagefolder":
        for split, name in zip(("train", "val", "test"), names):
            write_rows(root / split / "metadata.jsonl", name, pictures=False)
            write_pictures(root / split, name)
    elif form == "lines":
        write_rows(root / "x.jsonl", *names)
        return root / "x.jsonl"
    elif form == "pairs":
        write_pairs(root, **dict.fromkeys(names, "p"))
    elif form == "parquet":
        with (root / "train.parquet").open("wb") as file:
            table(names).to_parquet(file)
    else:
        other = root.parent / "plain"
        table(names).save_to_disk(str(other))
        for file in other.iterdir():
            file.rename(root / file.name)
        other.rmdir()
    return root


@pytest.mark.parametrize("form", ["imagefolder", "lines", "pairs", "parquet", "saved"])
def test_a_folder_is_taken_literally(tmp_path, form):
    """Beside folders that its name would stand for if it were a pattern."""
    few = ["a[1]", "a*", "a::b", "-a", NAMES[-1]]
    for i, name in enumerate(few if form in ("parquet", "saved") else NAMES):
        root = tmp_path / str(i)
        for decoy in ("a", "b", "a1", "aa"):
            write_pairs(root, bad=decoy)
        names = ["1.png", "2.png", "3.png"]
        splits, notes = loaded(write_form(root / name, form, names))
        assert sorted(n for targets in splits.values() for n in targets) == names
        assert not any("not used" in note for note in notes)


def test_the_cut_of_a_parquet_folder_follows_its_files(tmp_path):
    """What is cached for one state of a file is not taken for the next one."""
    write_parquet(tmp_path, train=4)
    assert sum(map(len, loaded(tmp_path)[0].values())) == 4
    write_parquet(tmp_path, train=6)
    assert sum(map(len, loaded(tmp_path)[0].values())) == 6


def test_a_tilde_is_the_home_folder_and_no_traceback(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_form(tmp_path / "mine", "pairs", ["1", "2", "3"])
    assert sum(map(len, loaded("~/mine")[0].values())) == 3
    with pytest.raises(UserError, match="~nobody/x: there is no such folder or file"):
        load_splits("~nobody/x")


def test_the_embedded_name_beside_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notes: list[str] = []
    load_splits("receipts", notes=notes)
    assert not any("./receipts" in note for note in notes)
    (tmp_path / "receipts").mkdir()
    load_splits("receipts", notes=notes)
    assert "to read that, pass --dataset ./receipts" in notes[-1]


# --- the splits that a layout names


def test_splits_behind_backslashes(tmp_path):
    write_rows(tmp_path / "metadata.jsonl", "train\\1.png", "VAL\\2.png", "deep\\Test\\3.png", "deep/train/4.png")
    splits, _ = loaded(tmp_path)
    assert list(splits.values()) == [["deep/train/4.png", "train\\1.png"], ["VAL\\2.png"], ["deep\\Test\\3.png"]]


def test_files_whose_names_hold_a_backslash(tmp_path):
    """As a ZIP archive from Windows leaves them."""
    for name in ("train\\1", "val\\2", "test\\3"):
        (tmp_path / f"{name}.png").write_bytes(picture_bytes())
        (tmp_path / f"{name}.json").write_text(json.dumps({"n": name}))
    assert list(loaded(tmp_path)[0].values()) == [["train\\1"], ["val\\2"], ["test\\3"]]


@pytest.mark.parametrize(
    ("train", "validation", "test"),
    [
        ("x/train/img:x/train/key", "x/val/img:x/val/key", "x/test/img:x/test/key"),
        ("TRAIN", "Validation", "Test"),
        ("img/train:key/train", "img/dev:key/dev", "img/eval:key/eval"),
        ("images/train:keys/train", "images/val:keys/val", "images/test:keys/test"),
        ("pictures/train:keys", "pictures/val:keys", "pictures/test:keys"),
        ("pictures:keys/train", "pictures:keys/val", "pictures:keys/test"),
        ("training_data/images:training_data/annotations", "val2017", "testing_data"),
        ("a/b/train/c/d", "a/b/valid/c", "Test Images"),
        ("other", "val", "test1"),
        ("train/blood-test", "val/latest", "test/train_x"),
    ],
)
def test_splits_of_pairs(tmp_path, train, validation, test):
    root = tmp_path / "test" / "data"  # above the named folder, names of splits do not matter
    write_pairs(root, one=train, two=validation, three=test)
    assert loaded(root)[0] == {"train": ["one"], "validation": ["two"], "test": ["three"]}


SURE = {
    "train": "train trainset train_images TRAININGset trainingdata trains trainA",
    "validation": "val valset devset VALSET val2017 validation-set validsplit devs",
    "test": "test testset TESTset TestSet testdata testimages tests test_set testfiles1 testDocs testimgs datatest",
}
"""Names by the split that they surely stand for."""


@pytest.mark.parametrize("role", SURE)
def test_names_that_stand_for_a_split(role):
    found = {name: split_named(name) for name in SURE[role].split()}
    assert {name: split and split.role for name, split in found.items()} == dict.fromkeys(found, role)
    assert all(split is not None and split.certainty > 0 for split in found.values())


@pytest.mark.parametrize(
    ("role", "names"),
    [
        ("validation or test", ["holdout", "held-out", "Held Out", "HoldOut", "holdoutset", "unseen", "hold_out_3"]),
        ("train or test", ["train_test", "traintest", "TrainTest", "train-test-split"]),
        ("train or validation or test", ["train_holdout", "train_val_test"]),
        ("train", ["trainval", "train_val", "training-manuals"]),
        ("validation", ["validate"]),
        ("test", ["blood-test", "receiptsTest"]),
    ],
)
def test_names_that_may_stand_for_a_split(role, names):
    assert {name: split_named(name) for name in names} == dict.fromkeys(names, SplitName(role, 0))


def test_words_that_only_contain_the_name_of_a_split():
    words = (
        "latest testimonials contest attest trainee trainer constraint devices invalid value evaluated household_out"
    )
    assert [word for word in words.split() if split_named(word) is not None] == []


@pytest.mark.parametrize("name", ["holdout", "train_test", "unseen"])
def test_parquet_files_whose_names_leave_their_split_open(tmp_path, name):
    write_parquet(tmp_path, train=1, **{name: 1})
    with pytest.raises(UserError, match=rf"{name}\.parquet: leaves open which split it is of; rename it"):
        load_splits(str(tmp_path))


def test_test_rows_behind_glued_names_are_not_trained_on(tmp_path):
    write_parquet(tmp_path / "a", trainset=2, valset=1, testset=1)
    assert loaded(tmp_path / "a")[0] == {
        "train": ["trainset0", "trainset1"], "validation": ["valset0"], "test": ["testset0"],
    }  # fmt: skip
    write_rows(tmp_path / "b" / "metadata.jsonl", "train_images/1.png", "holdout/2.png")
    with pytest.raises(UserError, match=r"holdout \(1 rows\): validation or test\?"):
        load_splits(str(tmp_path / "b"))


@pytest.mark.parametrize(
    "name", ["latest", "testimonials", "contest", "devices", "training-manuals", "invalid", "trainval"]
)
def test_names_that_are_no_splits(tmp_path, name):
    write_pairs(tmp_path, test=name, atest=name, three=f"{name}/deep", four="other")
    splits, notes = loaded(tmp_path)
    assert len(splits["train"]) == 2
    assert len(notes) == 2 and all("are kept for it, chosen by" in note for note in notes)


@pytest.mark.parametrize(
    "name", ["blood-test", "receipts_test", "Test Certificates", "holdout", "train/test", "test/deep/val"]
)
def test_names_that_may_be_splits_stop(tmp_path, name):
    write_pairs(tmp_path, one="other", two=f"other/{name}", three="other/more", four="other")
    with pytest.raises(UserError, match=r"leave open whether their rows are for training\. Rename each") as caught:
        load_splits(str(tmp_path))
    assert "(1 rows): " in str(caught.value) and str(caught.value).endswith("?")


def test_splits_that_the_names_of_pictures_say(tmp_path):
    names = ["train_1", "Train-2", "train3", "val_1", "test_001"]
    write_pairs(tmp_path / "a", **dict.fromkeys(names, "."))
    assert list(loaded(tmp_path / "a")[0].values()) == [["Train-2", "train3", "train_1"], ["val_1"], ["test_001"]]
    write_pairs(tmp_path / "b", **dict.fromkeys([*names, "other"], "."))
    with pytest.raises(
        UserError, match=r"5 of 6 pictures begin or end with the name of a split, such as \S+, and others do not"
    ):
        load_splits(str(tmp_path / "b"))
    write_pairs(tmp_path / "c", test_1="x", train="x", test="x", trained_3="x", val="x", valued_1="x")
    assert sum(map(len, loaded(tmp_path / "c")[0].values())) == 6
    write_rows(tmp_path / "d" / "metadata.jsonl", "train_1.png", "val_1.png", "test_1.png")
    assert list(loaded(tmp_path / "d")[0].values()) == [["train_1.png"], ["val_1.png"], ["test_1.png"]]


@pytest.mark.parametrize("pattern", ["test_{}", "{}_test", "{}-Test", "test{}", "{}test"])
def test_splits_at_either_end_of_the_names_of_pictures(tmp_path, pattern):
    test = [pattern.format(i) for i in range(2)]
    train = [name.replace("test", "train").replace("Test", "train") for name in test]
    write_pairs(tmp_path / "a", **dict.fromkeys([*train, *test, "2_val", "3_val"], "."))
    assert loaded(tmp_path / "a")[0] == {"train": train, "validation": ["2_val", "3_val"], "test": test}
    for other, names in (("b", [f"scan{i}" for i in range(9)]), ("c", [*train, "scan1"])):
        write_pairs(tmp_path / other, **dict.fromkeys([*test, *names], "."))
        with pytest.raises(UserError, match="pictures begin or end with the name of a split"):
            load_splits(str(tmp_path / other))
    write_pairs(tmp_path / "d", **dict.fromkeys([*test[:1], "scan1", "scan2"], "."))
    note = f"{tmp_path}/d: pictures that count as train, although their names begin or end with another split: 1"
    assert loaded(tmp_path / "d")[1][0] == f"{note}\n  {test[0]}.png"


def test_names_of_pictures_that_mean_no_split_do_after_the_move_that_the_error_asks_for(tmp_path):
    """They could be the test split of somebody who numbers by words, so nothing is trained on until it is settled."""
    names = ["blood_test", "covid_test", "invoice", "letter"]
    write_pairs(tmp_path / "a", **dict.fromkeys(names, "."))
    with pytest.raises(UserError, match=r"such as blood_test\.png, .* If none is meant, move all into a folder train$"):
        load_splits(str(tmp_path / "a"))
    write_pairs(tmp_path / "b", **dict.fromkeys(names, "train"))
    splits, notes = loaded(tmp_path / "b")
    assert sorted(name for split in splits.values() for name in split) == names
    assert len(notes) == 2 and all("are kept for it, chosen by" in note for note in notes)


def test_files_that_git_lfs_has_not_fetched(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    write_pairs(tmp_path / "a", one="x", two="x", three="x")
    (tmp_path / "a/x/one.png").write_bytes(pointer)
    for folder, name in (("b", "train.parquet"), ("c", "metadata.jsonl")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(pointer)
    for folder, name in (("a", "x/one.png"), ("b", "train.parquet"), ("c", "metadata.jsonl")):
        with pytest.raises(UserError, match=rf"{name}.*: is a Git LFS pointer .*; run `git lfs pull`"):
            loaded(tmp_path / folder)


def test_one_file_of_a_folder(tmp_path):
    write_parquet(tmp_path / "a", train=4)
    (tmp_path / "a" / "test").mkdir()
    with pytest.raises(UserError, match=rf"pass its folder, --dataset {tmp_path}/a$"):
        load_splits(str(tmp_path / "a" / "train.parquet"))
    assert any("empty folders that are called as a split is: 1\n  test" in note for note in loaded(tmp_path / "a")[1])
    write_rows(tmp_path / "b" / "Train.JSONL", "1.png", "2.png", "3.png")
    assert sum(map(len, loaded(tmp_path / "b" / "Train.JSONL")[0].values())) == 3


def test_a_tree_of_each_split_is_not_paired_with_the_other(tmp_path):
    write_pairs(tmp_path, one="train/img:test/key", two="train", three="train", four="train")
    with pytest.raises(UserError, match=r"2 of 5 rows .*\n.*one\.png: has no one\.json.*\n.*one\.json: has no picture"):
        check_split(*load_splits(str(tmp_path)).values())


def test_metadata_at_any_depth(tmp_path):
    write_rows(tmp_path / "SROIE" / "train" / "metadata.jsonl", "1.png", "deep/2.png")
    write_rows(tmp_path / "SROIE" / "Test" / "metadata.jsonl", "3.png")
    write_rows(tmp_path / "val" / "more" / "metadata.jsonl", "4.png")
    write_rows(tmp_path / "val" / "metadata.jsonl", "5.png")
    splits, notes = loaded(tmp_path)
    assert splits == {"train": ["1.png", "deep/2.png"], "validation": ["4.png", "5.png"], "test": ["3.png"]}
    assert not notes


def test_json_lines_named_by_split(tmp_path):
    write_rows(tmp_path / "a" / "train.jsonl", "1.png")
    write_rows(tmp_path / "a" / "validation.jsonl", "2.png")
    write_rows(tmp_path / "a" / "test.jsonl", "3.png")
    assert loaded(tmp_path / "a") == ({"train": ["1.png"], "validation": ["2.png"], "test": ["3.png"]}, [])
    write_rows(tmp_path / "b" / "metadata.jsonl", "1.png", "val/2.png")
    write_rows(tmp_path / "b" / "metadata_test.jsonl", "3.png")
    assert loaded(tmp_path / "b") == ({"train": ["1.png"], "validation": ["val/2.png"], "test": ["3.png"]}, [])
    write_rows(tmp_path / "a" / "train.jsonl", "1.png", "4.png", "5.png")
    _, notes = loaded(tmp_path / "a" / "train.jsonl")
    assert f"read alone; --dataset {tmp_path}/a reads test.jsonl, validation.jsonl as splits, too" in notes[0]


def test_json_lines_that_are_left_out_for_their_names(tmp_path):
    write_rows(tmp_path / "data.jsonl", "1.png", "2.png", "3.png")
    write_rows(tmp_path / "test.jsonl", "4.png")
    reason = (
        r"JSON-lines files not used, as their names say no split \(call them train\.jsonl, .*1 \.jsonl: data\.jsonl"
    )
    with pytest.raises(UserError, match=rf"it has test; pass --train-split NAME, or rename[\s\S]*{reason}"):
        load_splits(str(tmp_path))
    note = loaded(tmp_path / "data.jsonl")[1][0]
    assert note.endswith("reads test.jsonl as splits, too, if data.jsonl is called train.jsonl")
    (tmp_path / "data.jsonl").rename(tmp_path / "train.jsonl")
    (tmp_path / "test.jsonl").rename(tmp_path / "holdout.jsonl")
    notes = loaded(tmp_path)[1]
    assert any("JSON-lines files not used" in note and "holdout.jsonl" in note for note in notes)
    (tmp_path / "holdout.jsonl").rename(tmp_path / "testset.jsonl")
    assert loaded(tmp_path)[0]["test"] == ["4.png"]


def write_split_column(file: Path, *splits: object) -> None:
    write_pictures(file.parent, *(f"{i}.png" for i in range(len(splits))))
    rows = [{"file_name": f"{i}.png", "target": {"n": str(i)}, "split": split} for i, split in enumerate(splits)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("name", ["metadata.jsonl", "all.jsonl"])
def test_a_column_of_lines_that_says_the_split(tmp_path, name):
    dataset = tmp_path if name == "metadata.jsonl" else tmp_path / name
    write_split_column(tmp_path / name, "train", "Val", "testset", "train", None)
    assert loaded(dataset)[0] == {"train": ["0", "3", "4"], "validation": ["1"], "test": ["2"]}
    write_split_column(tmp_path / name, "train", "holdout", "train")
    with pytest.raises(
        UserError, match=r"or in the column split, leave open .*\n  holdout \(1 rows\): validation or test"
    ):
        load_splits(str(dataset))
    write_split_column(tmp_path / name, "a", 1, "b/c")
    notes = loaded(dataset)[1]
    assert "3 rows have a column split that names no split (a, 1, b/c) and has no effect" in notes[0]


@pytest.mark.parametrize("kind", ["text", "label"])
def test_a_column_of_a_table_that_says_the_split(tmp_path, kind):
    values = ["train", "test", "val", "train"]
    rows = table(list("0123")).add_column("split", values)
    if kind == "label":
        rows = rows.class_encode_column("split")
    rows.to_parquet(tmp_path / "all.parquet")
    assert loaded(tmp_path)[0] == {"train": ["0", "3"], "validation": ["2"], "test": ["1"]}
    rows.to_parquet(tmp_path / "test.parquet")
    (tmp_path / "all.parquet").rename(tmp_path / "train.parquet")
    assert "column split says train, validation, too; all its rows" in " ".join(loaded(tmp_path)[1])


def test_json_lines_that_name_no_split_are_named_themselves(tmp_path):
    write_rows(tmp_path / "receipts.jsonl", "1.png", "2.png", "3.png")
    with pytest.raises(
        UserError, match=r"Files there: 4 \(3 \.png, 1 \.jsonl: .*To read receipts\.jsonl, pass --dataset .*/recei"
    ):
        load_splits(str(tmp_path))


def test_parquet_files_by_name(tmp_path):
    write_parquet(tmp_path / "a", **{"TRAIN__0": 2, "TRAIN__1": 1, "Val__0": 1, "data__x_test": 2, "more": 3})
    splits, notes = loaded(tmp_path / "a")
    assert splits == {
        "train": ["TRAIN/00", "TRAIN/01", "TRAIN/10"],
        "validation": ["Val/00"],
        "test": ["data/x_test0", "data/x_test1"],
    }
    assert notes == [f"{tmp_path}/a: splits not used: more (3 rows); --train-split NAME trains on one of them"]
    write_parquet(tmp_path / "b", one=3, two=2)
    assert sum(map(len, loaded(tmp_path / "b")[0].values())) == 5
    write_parquet(tmp_path / "c", **{"train__test": 2})
    with pytest.raises(UserError, match=r"c/train/test\.parquet: leaves open which split"):
        load_splits(str(tmp_path / "c"))
    write_parquet(tmp_path / "d", **{"data__train-00001_of_00003": 2})
    with pytest.raises(UserError, match=r"only 1 of the 3 files data/train-\*-of-00003\.parquet are there"):
        load_splits(str(tmp_path / "d"))
    write_parquet(tmp_path / "e", train=2)
    (tmp_path / "e" / "test.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"e/test\.parquet: cannot be loaded"):
        load_splits(str(tmp_path / "e"))


def test_parquet_files_by_configuration(tmp_path):
    root = tmp_path / "a[1]"
    write_parquet(
        root, **{f"{config}__{split}": 1 for config in ("en", "de") for split in ("train", "validation", "test")}
    )
    configs = "".join(
        f"- config_name: {config}\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: {config}/{split}*\n" for split in ("train", "validation", "test"))
        for config in ("en", "de")
    )
    (root / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    splits, notes = loaded(root, config="de")
    assert splits == {"train": ["de/train0"], "validation": ["de/validation0"], "test": ["de/test0"]}
    assert "files not used, as no row names them: 3 (3 .parquet: en/test.parquet, " in notes[-1]
    with pytest.raises(UserError, match="Config name is missing"):
        load_splits(str(root))
    (root / "README.md").unlink()
    with pytest.raises(UserError, match=r"--dataset-config de: no README\.md of"):
        load_splits(str(root), config="de")


def test_splits_of_a_saved_data_set_in_any_case(tmp_path):
    splits = {"Train": table(["1", "2"]), "VAL": table(["3"]), "Test": table(["4"]), "extra": table(["5"])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "set")
    found, notes = loaded(tmp_path / "set")
    assert found == {"train": ["1", "2"], "validation": ["3"], "test": ["4"]}
    assert "splits not used: extra (1 rows)" in notes[0]


# --- rows, files and folders that are not used


def test_all_metadata_files_are_read(tmp_path):
    write_rows(tmp_path / "metadata.jsonl", "more/1.png", "more/2.png", "train/3.png", "train/4.png")
    write_rows(tmp_path / "train" / "metadata.jsonl", "3.png", pictures=False)
    splits, notes = loaded(tmp_path)
    assert sorted(n for targets in splits.values() for n in targets) == [
        "3.png", "more/1.png", "more/2.png", "train/4.png",
    ]  # fmt: skip
    assert notes[0].splitlines() == [
        f"{tmp_path}/metadata.jsonl: 1 of 4 rows are not used, as a file nearer to their pictures has them",
        f"  {tmp_path}/metadata.jsonl:3",
    ]


def test_what_is_not_used_is_named(tmp_path):
    write_rows(tmp_path / "train" / "metadata.jsonl", *(f"{i}.png" for i in range(5)))
    write_rows(tmp_path / "more" / "metadata.jsonl", "6.png")
    write_pictures(tmp_path, "train/orphan.png", "other/7.jpg", "other/deep/8.jpg", ".hidden/9.png")
    (tmp_path / "train.csv").write_text("a")
    (tmp_path / "README.md").write_text("# Receipts")
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to(".")
    _, notes = loaded(tmp_path)
    assert [note for note in notes if "are kept for it" not in note] == [
        f"{tmp_path}/loop: its files are listed once, in {tmp_path}",
        f"{tmp_path}: links that lead nowhere: 1 (1 without suffix: gone)",
        f"{tmp_path}: files not used, as no row names them: 4 "
        "(2 .jpg, 1 .csv, 1 .png: other/7.jpg, other/deep/8.jpg, train.csv, ...)",
        f"{tmp_path}: hidden files passed over: 1 (1 .png: .hidden/9.png)",
        f"{tmp_path}: splits not used: more (1 rows); --train-split NAME trains on one of them",
    ]


def test_linked_trees_are_read(tmp_path):
    write_pairs(tmp_path / "store", **{f"n{i}": "img:key" for i in range(4)})
    data = tmp_path / "data"
    data.mkdir()
    (data / "img").symlink_to("../store/img")
    (data / "key").symlink_to(tmp_path / "store" / "key")
    (data / "key" / "gone.json").symlink_to("nowhere")
    splits = load_splits(str(data))
    with pytest.raises(UserError, match=r"1 of 5 rows .*\n.*gone\.json: is a link to nowhere, which is not there"):
        check_split(*splits.values())


def test_documents_that_cannot_be_read_are_bad_rows(tmp_path):
    write_pairs(tmp_path, **{f"n{i}": "." for i in range(3)})
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
    for name in ("n4.HEIC", "n5.pdf", "n6.png"):
        (tmp_path / name).write_bytes(heic)
    for name in ("n4", "n6"):
        (tmp_path / f"{name}.json").write_text("{}")
    with pytest.raises(UserError) as caught:
        check_split(*load_splits(str(tmp_path)).values())
    lines = sorted(str(caught.value).splitlines()[1:])
    assert len(lines) == 3
    assert "n4.HEIC" in lines[0] and "is a HEIC picture; run `pip install pillow-heif`" in lines[0]
    assert "n5.pdf: has no n5.json beside it" in lines[1]
    assert "n6.png" in lines[2] and "is a HEIC picture" in lines[2]


def test_a_folder_of_a_split_without_rows_stops(tmp_path):
    write_rows(tmp_path / "x" / "train" / "metadata.jsonl", "1.png", "2.png", "3.png")
    write_pictures(tmp_path, "x/TEST/deep/4.png")
    (tmp_path / "y").mkdir()
    for folder in ("TEST", "val"):
        with pytest.raises(UserError, match=rf"x/{folder}: has no metadata\.jsonl"):
            load_splits(str(tmp_path))
        shutil.rmtree(tmp_path / "x" / folder)
        (tmp_path / "x" / "val").mkdir(exist_ok=True)
    (tmp_path / "x" / "val").rmdir()
    assert sum(map(len, loaded(tmp_path)[0].values())) == 3


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    write_pairs(tmp_path, **{f"n{i}": "." for i in range(3)}, locked="locked")
    lock_folder(monkeypatch, "locked")
    assert f"{tmp_path}: folders that cannot be listed: 1\n  locked" in loaded(tmp_path)[1]
    with pytest.raises(UserError, match="locked: the folder cannot be listed; check its permissions"):
        load_splits(str(tmp_path / "locked"))
