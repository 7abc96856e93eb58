"""Data sets in the forms people have them: read right, or refused in a line that says what is wrong where."""

import io
import json
import os
import struct
import zlib
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from im2json.data.check import check_split
from im2json.data.example import Split
from im2json.data.pictures import MAX_PIXELS, decode_picture
from im2json.data.sources import load_splits, open_splits
from im2json.data.stored import ArrowRows
from im2json.errors import UserError
from im2json.options import DataOptions

NotFound = datasets.exceptions.DatasetNotFoundError
SCANS = Path(os.environ.get("IM2JSON_SCANS", Path(__file__).parents[2] / "shared" / "data" / "scans"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    datasets.disable_progress_bars()


def picture_bytes(colour=(10, 20, 30), size=(8, 6), form="PNG", **options) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, form, **options)
    return stream.getvalue()


def file_bytes(picture: Image.Image, form="PNG", **options) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, form, **options)
    return stream.getvalue()


def write_split(folder: Path, rows: list[dict], start: int = 0) -> None:
    """Rows of metadata.jsonl with a picture each, of a colour that tells them apart."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as file:
        for i, row in enumerate(rows):
            (folder / f"{i:03}.png").write_bytes(picture_bytes((start + i, 0, 0)))
            file.write(json.dumps({"file_name": f"{i:03}.png", **row}, ensure_ascii=False) + "\n")


def cord_rows(count: int, split: str = "x") -> list[dict]:
    return [
        {"ground_truth": json.dumps({"gt_parse": {"total": f"{split}{i}"}, "meta": {"id": i}})} for i in range(count)
    ]


def three_splits(root: Path) -> Path:
    for start, (name, count) in enumerate([("train", 4), ("validation", 2), ("test", 3)]):
        write_split(root / name, cord_rows(count, name), start=50 * start)
    return root


# --- imagefolder


def assert_lines(lines: list[str], beginnings: list[str]) -> None:
    """As many lines as beginnings, each starting with its own."""
    for line, expected in zip(lines, beginnings, strict=True):
        assert line.strip().startswith(expected)


def test_imagefolder(tmp_path):
    splits = load_splits(str(three_splits(tmp_path)))
    assert list(splits) == ["train", "validation", "test"]
    assert [len(split) for split in splits.values()] == [4, 2, 3]
    test = splits["test"]
    assert isinstance(test, Split)
    assert test.name == "test"
    assert test.ids == ["test/000.png", "test/001.png", "test/002.png"]
    assert test.targets == [{"total": "test0"}, {"total": "test1"}, {"total": "test2"}]
    example = test[1]
    assert (example.id, example.target, example.image.mode, example.image.size) == (
        "test/001.png", {"total": "test1"}, "RGB", (8, 6),
    )  # fmt: skip
    assert example.image.getpixel((0, 0)) == (101, 0, 0)
    assert [e.id for e in test] == test.ids
    with pytest.raises(IndexError):
        test[3]
    check_split(*splits.values())


def test_targets_decode_no_picture(tmp_path, monkeypatch):
    splits = load_splits(str(three_splits(tmp_path)))
    monkeypatch.setattr("im2json.data.stored.decode_picture", lambda *_: pytest.fail("decoded a picture"))
    assert len(splits["train"].targets) == len(splits["train"].ids) == 4


@pytest.mark.parametrize("as_text", [True, False])
def test_values_stay_what_they_are(tmp_path, as_text):
    """Rows of unlike shapes: `datasets` itself would fill the keys that are missing and merge the types."""
    targets = [
        {"z": [[1, [2.5, "1.50"]], []], "a": None, "flag": True, "n": 0, "long": 12345678901234567890},
        {"z": "text", "menu": [{"nm": "é \u2028 x"}, {"nm": "b", "sub": {"nm": None}}], "empty": {}},
    ]
    column = "target" if as_text else "json"
    write_split(tmp_path / "train", [{column: json.dumps(t) if as_text else t} for t in targets] * 2)
    write_split(tmp_path / "val", [{column: json.dumps(t) if as_text else t} for t in targets])
    write_split(tmp_path / "test", [{column: json.dumps(t) if as_text else t} for t in targets])
    for split in load_splits(str(tmp_path)).values():
        assert [json.dumps(t) for t in split.targets[:2]] == [json.dumps(t) for t in targets]


def test_gt_parses_and_key_order(tmp_path):
    write_split(
        tmp_path / "train",
        [
            {"ground_truth": {"gt_parses": [{"b": 1, "a": 2}, {"c": 3}]}},
            {"ground_truth": {"gt_parse": {"b": {}}, "meta": 1}},
            {"ground_truth": {"b": 1, "a": 2}},
        ],
    )
    splits = load_splits(str(tmp_path))
    texts = sorted(json.dumps(target) for split in splits.values() for target in split.targets)
    assert texts == ['{"b": 1, "a": 2}', '{"b": 1, "a": 2}', '{"b": {}}']


def test_metadata_above_the_split_folders(tmp_path):
    three_splits(tmp_path)
    lines = []
    for name in ("train", "validation", "test"):
        for line in (tmp_path / name / "metadata.jsonl").read_text().splitlines():
            row = json.loads(line)
            lines.append(json.dumps({**row, "file_name": f"{name}/{row['file_name']}"}))
        (tmp_path / name / "metadata.jsonl").unlink()
    (tmp_path / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\n\n")
    splits = load_splits(str(tmp_path))
    assert [len(split) for split in splits.values()] == [4, 2, 3]
    assert splits["test"][0].id == "test/000.png"


def test_the_same_picture_twice_has_two_ids(tmp_path):
    three_splits(tmp_path)
    metadata = tmp_path / "test" / "metadata.jsonl"
    metadata.write_text(metadata.read_text() + metadata.read_text())
    ids = load_splits(str(tmp_path))["test"].ids
    assert ids[:3] == ["test/000.png", "test/001.png", "test/002.png"]
    assert ids[3] == "test/000.png#2"
    assert len(set(ids)) == 6


def test_columns_by_name(tmp_path):
    write_split(tmp_path / "train", [{"ground_truth": "no", "label": {"i": i}} for i in range(5)])
    splits = load_splits(str(tmp_path), target_column="label")
    assert sorted(t["i"] for s in splits.values() for t in s.targets) == list(range(5))


# --- a file of JSON lines


def write_lines(file: Path, rows: list[dict]) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def write_pictures(folder: Path, names: list[str]) -> None:
    """Pictures of different colours."""
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture_bytes((i, 0, 0)))


def test_json_lines(tmp_path, monkeypatch):
    names = [f"scans/{i}.png" for i in range(10)]
    write_pictures(tmp_path / "data", names)
    file = write_lines(tmp_path / "data" / "all.jsonl", [{"image": n, "target": {"n": n}} for n in names])
    notes: list[str] = []
    splits = load_splits(file, notes=notes)
    assert [len(split) for split in splits.values()] == [8, 1, 1]
    assert len(notes) == 2
    assert sorted(i for split in splits.values() for i in split.ids) == names
    assert all(example.target == {"n": example.id} for split in splits.values() for example in split)
    monkeypatch.chdir(tmp_path)  # paths are relative to the file, wherever the run is started
    assert load_splits("data/all.jsonl")["test"][0].id == splits["test"].ids[0]


def test_json_lines_with_other_columns_and_split_folders(tmp_path):
    names = ["train/a.png", "val/b.png", "test/c.png", "d.png"]
    write_pictures(tmp_path, names)
    rows = [{"image": "no.png", "scan": n, "target": "no", "label": json.dumps({"n": n})} for n in names]
    splits = load_splits(write_lines(tmp_path / "x.jsonl", rows), image_column="scan", target_column="label")
    assert {name: split.ids for name, split in splits.items()} == {
        "train": ["train/a.png", "d.png"], "validation": ["val/b.png"], "test": ["test/c.png"],
    }  # fmt: skip
    assert splits["test"].targets == [{"n": "test/c.png"}]
    check_split(*splits.values())


def test_json_lines_that_are_bad(tmp_path):
    names = ["train/a.png", "val/b.png", "test/c.png"]
    write_pictures(tmp_path / "data", names)
    write_pictures(tmp_path, ["secret.png"])
    outside = ["../secret.png", str(tmp_path / "secret.png")]
    rows = [{"image": name, "target": {}} for name in [*names, *outside]]
    file = write_lines(tmp_path / "data" / "x.jsonl", [*rows, {"picture": "train/a.png", "target": {}}])
    with pytest.raises(ValueError, match="3 of 6 rows") as caught:
        check_split(*load_splits(file).values())
    lines = [line.strip() for line in str(caught.value).splitlines()[1:]]
    assert lines[0] == f"{file}:4: '../secret.png' leads out of the data set's folder; give a path within it"
    assert lines[1].startswith(f"{file}:5: '{tmp_path}/secret.png' leads out of")
    assert lines[2].startswith(f"{file}:6: names no picture")
    with pytest.raises(ValueError, match="names no picture; scan must be its path"):
        check_split(load_splits(file, image_column="scan")["train"])
    with pytest.raises(ValueError, match="its split train is empty"):
        load_splits(write_lines(tmp_path / "none.jsonl", []))


# --- pairs of files


def write_sroie(root: Path, names: list[str], start: int = 0) -> None:
    """Pictures in img/ with key/NAME.json each."""
    for i, name in enumerate(names, start):
        for folder in ("img", "key"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        (root / "img" / f"{name}.jpg").write_bytes(picture_bytes((8 * i, 0, 0), form="JPEG"))
        target = {"company": "TAN CHAY YEE", "date": "10/10/2018", "total": f"{i}.00"}
        (root / "key" / f"{name}.json").write_text(json.dumps(target, indent=4))


def test_sroie(tmp_path):
    write_sroie(tmp_path, [f"{i:03}" for i in range(10)])
    (tmp_path / "box").mkdir()
    (tmp_path / "box" / "000.csv").write_text("72,25,326,25,326,64,72,64,TAN CHAY YEE")
    splits = load_splits(str(tmp_path))
    assert [len(split) for split in splits.values()] == [8, 1, 1]
    by_id = {example.id: example.target for split in splits.values() for example in split}
    assert by_id.keys() == {f"img/{i:03}.jpg" for i in range(10)}
    assert by_id["img/007.jpg"] == {"company": "TAN CHAY YEE", "date": "10/10/2018", "total": "7.00"}
    check_split(*splits.values())


def test_sroie_in_split_folders(tmp_path):
    write_sroie(tmp_path / "train", ["000", "001"])
    write_sroie(tmp_path / "val", ["000"], start=5)
    write_sroie(tmp_path / "test", ["000"], start=6)
    notes: list[str] = []
    splits = load_splits(str(tmp_path), notes=notes)
    assert not notes
    assert {name: split.ids for name, split in splits.items()} == {
        "train": ["train/img/000.jpg", "train/img/001.jpg"],
        "validation": ["val/img/000.jpg"],
        "test": ["test/img/000.jpg"],
    }
    assert splits["test"].targets[0]["total"] == "6.00"


def test_json_beside_its_picture(tmp_path):
    names = ["train/a.b.png", "train/deep/c.PNG", "validation/a.png", "test/a.png"]
    write_pictures(tmp_path, names)
    for name in names:
        (tmp_path / name).with_suffix(".json").write_bytes(b"\xef\xbb\xbf" + json.dumps({"n": name}).encode())
    (tmp_path / "train" / "._c.png").write_bytes(b"what macOS leaves")
    splits = load_splits(str(tmp_path))
    assert [(e.id, e.target) for split in splits.values() for e in split] == [(n, {"n": n}) for n in names]


def test_bad_pairs_are_listed_by_name(tmp_path):
    for start, split in enumerate(("train", "validation", "test")):
        write_sroie(tmp_path / split, ["000", "001"], start=2 * start)
    train = tmp_path / "train"
    (train / "key" / "000.json").unlink()
    (train / "key" / "005.json").write_text("{}")
    (train / "key" / "007.json").write_bytes(b'{"company": "\xe9"}')
    for name in ("006.jpg", "006.png", "007.jpg"):
        (train / "img" / name).write_bytes(picture_bytes())
    (train / "key" / "006.json").write_text("{}")
    (tmp_path / "test" / "key" / "001.json").write_text('{"total": 1,}')
    with pytest.raises(ValueError, match="5 of 9 rows") as caught:
        check_split(*load_splits(str(tmp_path)).values())
    assert_lines(
        str(caught.value).splitlines()[1:],
        [
            f"{train}/img/000.jpg: has no 000.json beside it",
            f"{train}/key/005.json: has no picture of that name",
            f"{train}/img/006.jpg, {train}/img/006.png, {train}/key/006.json: share a name",
            f"{train}/key/007.json: is not UTF-8 text",
            f"{tmp_path}/test/key/001.json: is not JSON",
        ],
    )


# --- what save_to_disk wrote


def test_saved_to_disk(tmp_path):
    cord_dataset(10, "train").save_to_disk(tmp_path / "one")
    splits = load_splits(str(tmp_path / "one"))
    assert [len(split) for split in splits.values()] == [8, 1, 1]
    assert splits["train"].ids[0].startswith("one-train-")
    splits = {name: cord_dataset(2, name) for name in ("train", "validation", "test")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "three")
    splits = load_splits(str(tmp_path / "three"))
    assert [split.ids[1] for split in splits.values()] == ["three-train-1", "three-validation-1", "three-test-1"]
    assert splits["test"][1].image.getpixel((0, 0)) == (161, 0, 0)
    assert splits["test"][1].target == {"total": "test1"}
    check_split(*splits.values())


def test_saved_to_disk_but_broken(tmp_path):
    cord_dataset(3, "train").save_to_disk(tmp_path / "elsewhere")
    datasets.DatasetDict({"train": cord_dataset(3, "train")}).save_to_disk(tmp_path / "set")
    state = tmp_path / "set" / "train" / "state.json"
    state.write_text(state.read_text().replace("data-00000", "../../elsewhere/data-00000"))
    with pytest.raises(ValueError, match=r"set: cannot be loaded .*state\.json: '\.\./.*leads out of"):
        load_splits(str(tmp_path / "set"))
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["../elsewhere"]}')
    with pytest.raises(ValueError, match=r"cannot be loaded .*'\.\./elsewhere' leads out of"):
        load_splits(str(tmp_path / "set"))
    (tmp_path / "set" / "dataset_dict.json").write_text("{}")
    with pytest.raises(ValueError, match="set: cannot be loaded as what save_to_disk writes"):
        load_splits(str(tmp_path / "set"))


# --- options that a form of data does not have


def test_options_that_a_form_does_not_have(tmp_path):
    write_split(tmp_path / "folder" / "train", cord_rows(3))
    write_sroie(tmp_path / "pairs", ["0", "1", "2"])
    for dataset, option, flag in [
        ("receipts", {"target_column": "x"}, "--target-column"),
        (tmp_path / "folder", {"revision": "x"}, "--revision"),
        (tmp_path / "folder", {"config": "x"}, "--dataset-config"),
        (tmp_path / "folder" / "train" / "metadata.jsonl", {"revision": "x"}, "--revision"),
        (tmp_path / "pairs", {"image_column": "x"}, "--image-column"),
    ]:
        with pytest.raises(ValueError, match=f"^{flag} x: .*{Path(dataset).name} is of a form that has none"):
            load_splits(str(dataset), **option)


# --- missing splits


def test_missing_splits_are_cut_by_content(tmp_path):
    write_split(tmp_path / "one" / "train", cord_rows(40))
    notes: list[str] = []
    splits = load_splits(str(tmp_path / "one"), notes=notes)
    assert [len(splits[name]) for name in ("train", "validation", "test")] == [32, 4, 4]
    assert len({i for split in splits.values() for i in split.ids}) == 40
    assert len(notes) == 2
    assert "no validation split: 4 of the 40 rows of train" in notes[0]

    again = load_splits(str(tmp_path / "one"), seed=7)
    assert {name: split.ids for name, split in again.items()} == {n: s.ids for n, s in splits.items()}

    # other file names and another order: the same contents on the same side
    rows = [json.loads(line) for line in (tmp_path / "one/train/metadata.jsonl").read_text().splitlines()]
    other = tmp_path / "two" / "train"
    other.mkdir(parents=True)
    with (other / "metadata.jsonl").open("w") as file:
        for i, row in enumerate(reversed(rows)):
            (other / f"r{i}.png").write_bytes((tmp_path / "one/train" / row["file_name"]).read_bytes())
            file.write(json.dumps({**row, "file_name": f"r{i}.png"}) + "\n")
    moved = load_splits(str(tmp_path / "two"))
    for name, split in splits.items():
        assert sorted(t["total"] for t in moved[name].targets) == sorted(t["total"] for t in split.targets)


def test_a_cut_does_not_depend_on_the_other(tmp_path):
    write_split(tmp_path / "a" / "train", cord_rows(30))
    write_split(tmp_path / "b" / "train", cord_rows(30))
    write_split(tmp_path / "b" / "validation", cord_rows(2), start=200)
    both, one = load_splits(str(tmp_path / "a")), load_splits(str(tmp_path / "b"))
    assert both["test"].ids == one["test"].ids
    assert len(one["train"]) == 27
    assert len(one["validation"]) == 2


def test_equal_pictures_stay_together(tmp_path):
    write_split(tmp_path / "train", cord_rows(20))
    metadata = tmp_path / "train" / "metadata.jsonl"
    for i in range(20):
        data = (tmp_path / "train" / f"{i:03}.png").read_bytes()
        (tmp_path / "train" / f"copy{i}.png").write_bytes(data)
        with metadata.open("a") as file:
            file.write(json.dumps({"file_name": f"copy{i}.png", "ground_truth": {"copy": i}}) + "\n")
    sides: dict[tuple, set] = {}
    for name, split in load_splits(str(tmp_path)).items():
        for example in split:
            sides.setdefault(example.image.getpixel((0, 0)), set()).add(name)
    assert len(sides) == 20
    assert all(len(names) == 1 for names in sides.values())


def test_too_few_to_cut(tmp_path):
    write_split(tmp_path / "train", cord_rows(2))
    with pytest.raises(ValueError, match=r"2 different usable pictures of train are too few.*at least 3"):
        load_splits(str(tmp_path))


def test_train_split_by_name(tmp_path):
    three_splits(tmp_path)
    write_split(tmp_path / "small", cord_rows(1, "small"))
    splits = load_splits(str(tmp_path), train_split="small")
    assert splits["train"].targets == [{"total": "small0"}]
    assert len(splits["test"]) == 3
    with pytest.raises(ValueError, match=r"big: .* has no such split; it has small, test, train"):
        load_splits(str(tmp_path), train_split="big")


def test_training_on_test_is_not_testing_on_it(tmp_path):
    write_split(tmp_path / "test", cord_rows(20))
    splits = load_splits(str(tmp_path), train_split="test")
    assert [len(split) for split in splits.values()] == [16, 2, 2]


# --- what is refused


def test_all_bad_rows_in_one_error(tmp_path):
    three_splits(tmp_path)
    train = tmp_path / "train"
    (train / "001.png").unlink()
    (train / "002.png").write_bytes(picture_bytes(size=(99, 99), form="PNG")[:-60])
    (train / "003.png").write_text("hello, I am text")
    with (train / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "000.png", "ground_truth": "{\\"gt_parse\\": {"}\n')
        file.write('{"file_name": "000.png", \n')
        file.write('{"file_name": "000.png", "ground_truth": [1, 2]}\n')
        file.write('{"file_name": "../test/000.png", "ground_truth": {}}\n')
        file.write('{"file_name": "000.png", "text": {}}\n')
        file.write('{"text": {}}\n')
        file.write('{"file_name": "000.png", "ground_truth": {"a": 1, "a": 2}}\n')
    splits = load_splits(str(tmp_path))
    seen: list[int] = []
    with pytest.raises(ValueError, match=r"^10 of 16 rows cannot be used:") as caught:
        check_split(*splits.values(), on_row=lambda: seen.append(1))
    assert len(seen) == 16
    lines = str(caught.value).splitlines()[1:]
    assert_lines(
        lines,
        [
            f"{train}/001.png ({train}/metadata.jsonl:2): there is no such picture file",
            f"{train}/002.png: the picture is damaged or cut short",
            f"{train}/003.png: is not a picture that can be read",
            f"{train}/metadata.jsonl:5: is not JSON",
            f"{train}/metadata.jsonl:6: is not JSON",
            f"{train}/metadata.jsonl:7: the target must be a JSON object, not a list",
            f"{train}/metadata.jsonl:8: '../test/000.png' leads out of the data set's folder",
            f"{train}/metadata.jsonl:9: has no target (ground_truth, target, json); it has file_name, text",
            f"{train}/metadata.jsonl:10: names no picture",
            f"{train}/metadata.jsonl:11: the key 'a' stands twice in one object",
        ],
    )
    with pytest.raises(ValueError, match=r"metadata\.jsonl:5: is not JSON"):
        splits["train"][4]
    with pytest.raises(ValueError, match=r"5 of 11|6 of 11"):
        _ = splits["train"].targets
    check_split(splits["test"])


def test_a_name_that_no_file_can_have_is_a_bad_row(tmp_path):
    (tmp_path / "train").mkdir()
    lines = "".join(json.dumps({"file_name": f"\ud800{i}.png", "target": {}}) + "\n" for i in range(3))
    (tmp_path / "train" / "metadata.jsonl").write_text(lines)
    with pytest.raises(UserError, match=r"metadata\.jsonl:1: .* cannot be the name of a file"):
        check_split(*load_splits(str(tmp_path)).values())


def test_a_column_of_text_that_is_not_utf_8_is_a_bad_row():
    texts = pa.array([b"{}", b'"caf\xe9"'], pa.binary()).view(pa.string())
    table = datasets.table.InMemoryTable(pa.table({"image": ["a.png"] * 2, "target": texts}))
    rows = ArrowRows(datasets.Dataset(table), "data", "train", "image", "target", [])
    assert rows.target(0) == {}
    with pytest.raises(UserError, match="row 1 of split train of data: holds text that is not UTF-8"):
        rows.target(1)


def test_a_row_that_is_bad_twice_says_both(tmp_path):
    three_splits(tmp_path)
    (tmp_path / "test" / "metadata.jsonl").write_text('{"file_name": "gone.png", "ground_truth": "{"}\n')
    with pytest.raises(ValueError, match=r"is not JSON.*; .*gone\.png.*no such picture"):
        check_split(load_splits(str(tmp_path))["test"])


def test_at_most_twenty_are_shown(tmp_path):
    three_splits(tmp_path)
    write_split(tmp_path / "train", [{"ground_truth": "{"} for _ in range(33)])
    with pytest.raises(ValueError, match="33 of 33") as caught:
        check_split(load_splits(str(tmp_path))["train"])
    lines = str(caught.value).splitlines()
    assert len(lines) == 22
    assert lines[-1] == "  ... and 13 more"


@pytest.mark.parametrize(
    "text",
    ['{"a": NaN}', '{"a": 1e999}', "[" * 5000, '{"a":' * 200 + "1" + "}" * 200, "null", "3", '"x"', ""],
)
def test_targets_that_are_no_objects(tmp_path, text):
    three_splits(tmp_path)
    write_split(tmp_path / "test", [{"ground_truth": text}])
    with pytest.raises(ValueError, match=r"metadata\.jsonl:1: "):
        _ = load_splits(str(tmp_path))["test"].targets


def refusal(dataset: object) -> str:
    """Return the error that names what --dataset may not be."""
    with pytest.raises(UserError) as caught:
        load_splits(str(dataset))
    return str(caught.value)


def test_folders_that_are_no_data_set(tmp_path):
    line = '{"file_name": "001.jpg", "ground_truth": {"total": "9.30"}}'
    nothing = f"{tmp_path}: holds no metadata.jsonl, Parquet files or pictures with a .json each."
    remedy = f"Write a metadata.jsonl with a line like {line} for each picture, or put a .json of its name beside each."
    assert refusal(tmp_path) == f"{nothing} {remedy}"
    (tmp_path / "file.txt").write_text("{}")
    assert refusal(tmp_path) == f"{nothing} Files there: 1 (1 .txt: file.txt). {remedy}"
    (tmp_path / "rows.jsonl").write_text("{}")
    assert refusal(tmp_path).endswith(f"rows.jsonl). To read rows.jsonl, pass --dataset {tmp_path / 'rows.jsonl'}.")
    (tmp_path / "rows.jsonl").unlink()

    names = "Name a folder of pictures with their JSON, a .jsonl file, or a data set on the hub."
    for dataset in (tmp_path / "nowhere", "nowhere.jsonl"):
        assert refusal(dataset) == f"--dataset {dataset}: there is no such folder or file. {names}"
    file = tmp_path / "file.txt"
    assert refusal(file) == f"--dataset {file}: is not a file of JSON lines. {names}"

    three_splits(tmp_path)
    (tmp_path / "test" / "metadata.jsonl").write_text("\n")
    assert "its split test is empty" in refusal(tmp_path)
    (tmp_path / "test" / "metadata.jsonl").unlink()
    without = f"{tmp_path / 'test'}: has no metadata.jsonl. Write one with a line like {line} for each picture."
    assert refusal(tmp_path) == without


# --- Parquet and the hub


def cord_dataset(count: int, split: str) -> datasets.Dataset:
    rows = cord_rows(count, split)
    colours = {"train": 0, "validation": 80, "test": 160}
    return datasets.Dataset.from_dict(
        {
            "image": [{"bytes": picture_bytes((colours[split] + i, 0, 0)), "path": None} for i in range(count)],
            "ground_truth": [row["ground_truth"] for row in rows],
        },
        features=datasets.Features({"image": datasets.Image(), "ground_truth": datasets.Value("string")}),
    )


def hub_layout(root: Path) -> Path:
    (root / "data").mkdir(parents=True)
    for split, count in (("train", 6), ("validation", 2), ("test", 3)):
        cord_dataset(count, split).to_parquet(str(root / "data" / f"{split}-00000-of-00001-0a1b2c.parquet"))
    return root


def test_parquet_folder(tmp_path):
    splits = load_splits(str(hub_layout(tmp_path / "cord-v2")))
    assert [len(split) for split in splits.values()] == [6, 2, 3]
    example = splits["test"][2]
    assert (example.id, example.target) == ("cord-v2-test-2", {"total": "test2"})
    assert example.image.getpixel((0, 0)) == (162, 0, 0)
    assert splits["train"].targets[5] == {"total": "train5"}
    check_split(*splits.values())


def test_hub_id(monkeypatch):
    def load_dataset(path, name=None, revision=None):
        assert (path, name, revision) == ("naver-clova-ix/cord-v2", None, "main")
        return datasets.DatasetDict({split: cord_dataset(20, split) for split in ("train", "test")})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    notes: list[str] = []
    splits = load_splits("naver-clova-ix/cord-v2", revision="main", notes=notes)
    assert [len(split) for split in splits.values()] == [18, 2, 20]
    assert splits["test"].ids[17] == "cord-v2-test-17"
    assert all(i.startswith("cord-v2-train-") for i in splits["validation"].ids)
    assert len(notes) == 1
    chosen = splits["validation"][0]
    assert chosen.target == {"total": "train" + chosen.id.rsplit("-", 1)[1]}


def test_options_of_a_hub_id(monkeypatch):
    def load_dataset(path, name=None, revision=None):
        assert (path, name, revision) == ("some/set", "en", "v2")
        columns = {"ground_truth": "label"}
        return datasets.DatasetDict({"all": cord_dataset(10, "train").rename_columns(columns | {"image": "scan"})})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    options = DataOptions("some/set", "en", "v2", "all", "scan", "label")
    splits = open_splits(options, [])
    assert {name: len(split) for name, split in splits.items()} == {"train": 10}


def test_bad_rows_of_a_table(tmp_path, monkeypatch):
    (tmp_path / "secret.png").write_bytes(picture_bytes())
    table = datasets.Dataset.from_dict(
        {
            "image": [
                {"bytes": picture_bytes(form="JPEG", size=(90, 90))[:-100], "path": "a.jpg"},
                {"bytes": None, "path": str(tmp_path / "secret.png")},
                None,
                {"bytes": picture_bytes(), "path": None},
            ],
            "ground_truth": ["{}", "{}", "{}", None],
        },
        features=datasets.Features({"image": datasets.Image(), "ground_truth": datasets.Value("string")}),
    )
    monkeypatch.setattr(
        datasets, "load_dataset",
        lambda *_, **__: datasets.DatasetDict({"train": table, "validation": table, "test": table}),
    )  # fmt: skip
    with pytest.raises(ValueError, match="4 of 4 rows") as caught:
        check_split(load_splits("some/set")["test"])
    lines = [line.strip() for line in str(caught.value).splitlines()[1:]]
    assert lines[0].startswith("row 0 of split test of some/set: the picture is damaged or cut short")
    assert "leads out of the data set's folder" in lines[1]
    assert lines[2] == "row 2 of split test of some/set: has no picture"
    assert lines[3] == "row 3 of split test of some/set: the target must be a JSON object, not null"


def test_columns_of_a_table(monkeypatch):
    def of(**columns):
        table = datasets.Dataset.from_dict(columns)
        splits = datasets.DatasetDict({"train": table, "validation": table, "test": table})
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: splits)
        notes: list[str] = []
        return load_splits("some/set", notes=notes), notes

    picture = Image.new("RGB", (3, 3))
    splits, notes = of(scan=[picture, picture], target=[{"a": 1, "b": [{"x": "1"}]}, {"c": None}])
    assert splits["test"].targets == [{"a": 1, "b": [{"x": "1"}]}, {}]
    assert "target is a struct: keys that are null are left out" in notes[0]
    assert splits["test"][0].image.size == (3, 3)
    with pytest.raises(ValueError, match=r"split train of some/set: has no picture column .*it has text"):
        of(text=["x"], target=["{}"])
    with pytest.raises(ValueError, match=r"has no target .*it has image, label"):
        of(image=[picture], label=[1])


def test_a_column_without_pictures(tmp_path):
    datasets.Dataset.from_dict({"n": [1, 2, 3], "target": ["{}"] * 3}).save_to_disk(tmp_path / "set")
    with pytest.raises(ValueError, match="split train of set: its column 'n' holds no pictures"):
        load_splits(str(tmp_path / "set"), image_column="n")


def test_json_columns_keep_everything(monkeypatch):
    if not hasattr(datasets, "Json"):
        pytest.skip("this version of datasets has no JSON columns")
    values = [{"a": None, "b": [1, "x", [True]]}, {"c": 1.5}]
    table = datasets.Dataset.from_dict(
        {"image": [Image.new("L", (2, 2))] * 2, "json": values},
        features=datasets.Features({"image": datasets.Image(), "json": datasets.Json()}),
    )
    both = datasets.DatasetDict({"train": table, "validation": table, "test": table})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: both)
    notes: list[str] = []
    assert load_splits("some/set", notes=notes)["test"].targets == values
    assert not notes


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (NotFound("Dataset 'o/x' is a gated dataset on the Hub."), "is gated; accept .*hf auth login"),
        (NotFound("Dataset 'o/x' doesn't exist"), "neither a folder here nor a data set on the"),
        (ConnectionError("Couldn't reach 'o/x' on the Hub"), "neither a folder here nor in reach"),
        (ValueError("Config name is missing.\nPlease pick among: ['a']"), r"Please pick among: \['a'\]"),
        (datasets.exceptions.DatasetGenerationError("An error occurred"), "cannot be loaded"),
    ],
)  # fmt: skip
def test_hub_errors(monkeypatch, error, expected):
    def load_dataset(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=f"^--dataset o/x: .*{expected}") as caught:
        load_splits("o/x")
    assert "\n" not in str(caught.value)


def test_offline_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="--dataset recipts: is neither a folder here nor in reach"):
        load_splits("recipts")


def test_receipts():
    notes: list[str] = []
    splits = load_splits("receipts", seed=1, notes=notes)
    assert list(splits) == ["train", "validation", "test"]
    assert all(isinstance(split, Split) for split in splits.values())
    assert "synthetic" in notes[0]
    example = splits["test"][0]
    assert example.image.mode == "RGB"
    assert example.target == splits["test"].targets[0]
    check_split(*splits.values())
    with pytest.raises(ValueError, match="receipts has the splits train, validation, test"):
        load_splits("receipts", train_split="all")


# --- pictures as they come


@pytest.mark.parametrize(("orientation", "corner"), [(1, (0, 0)), (3, (3, 1)), (6, (1, 0)), (8, (0, 3))])
def test_exif_orientation(orientation, corner):
    stored = Image.new("RGB", (4, 2))
    stored.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode_picture(file_bytes(stored, "PNG", exif=exif), "x")
    assert image.size == ((4, 2) if orientation in (1, 3) else (2, 4))
    assert image.getpixel(corner) == (255, 255, 255)


def test_transparency_is_white():
    half = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    half.putpixel((1, 0), (200, 0, 0, 255))
    for picture in (half, half.quantize(4)):
        image = decode_picture(file_bytes(picture), "x")
        assert [image.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (200, 0, 0)]
    image = decode_picture(file_bytes(Image.new("LA", (1, 1), (0, 0))), "x")
    assert image.getpixel((0, 0)) == (255, 255, 255)
    image = decode_picture(file_bytes(Image.new("L", (1, 1), 7), transparency=7), "x")
    assert image.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(("form", "options"), [("PNG", {}), ("TIFF", {})])
def test_sixteen_bits_are_scaled(form, options):
    grey = np.array([[0, 32768, 65535]], np.uint16)
    image = decode_picture(file_bytes(Image.fromarray(grey), form, **options), "x")
    assert [image.getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (np.array([[0, 70000, 140000]], np.int32), [0, 128, 255]),
        (np.array([[0, 128, 255]], np.int32), [0, 128, 255]),
        (np.array([[0, 0.5, 1.0]], np.float32), [0, 128, 255]),
    ],
)
def test_wide_greys(pixels, expected):
    image = decode_picture(file_bytes(Image.fromarray(pixels), "TIFF"), "x")
    assert [image.getpixel((x, 0))[0] for x in range(3)] == expected


def test_other_modes():
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red, green, blue = decode_picture(file_bytes(cmyk, "JPEG", quality=95), "x").getpixel((8, 8))
    assert red > 200
    assert max(green, blue) < 60
    palette = Image.new("RGB", (4, 4), (9, 99, 199)).quantize(2)
    assert decode_picture(file_bytes(palette), "x").getpixel((0, 0)) == (9, 99, 199)
    assert decode_picture(file_bytes(Image.new("1", (1, 1), 1)), "x").getpixel((0, 0)) == (255, 255, 255)


def bomb(width: int, height: int) -> bytes:
    """A PNG that says it is large; its pixels never need to be there."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "is empty"),
        (b"%PDF-1.7 ...", "is a PDF, not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is PostScript, not a picture"),
        (b"<html>not found</html>", "is not a picture"),
        (bomb(100_000, 100_000), "too many pixels .at most 90 million"),
        (bomb(MAX_PIXELS // 8000, 8001), "11250 x 8001 are too many pixels"),
        (picture_bytes(form="JPEG", size=(64, 64))[:-200], "damaged or cut short"),
        (picture_bytes(form="PNG", size=(64, 64))[:40], "damaged or cut short"),
        (picture_bytes(form="GIF", size=(64, 64))[:30], "damaged or cut short"),
        (picture_bytes(form="TIFF", size=(64, 64))[:300], "damaged or cut short|is not a picture"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Image size")
def test_pictures_that_are_refused(data, expected):
    with pytest.raises(ValueError, match=f"^some/file.jpg: .*({expected})"):
        decode_picture(data, "some/file.jpg")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_any_damage_is_a_value_error():
    """A byte changed or an end cut off anywhere: a picture or one ValueError, never another exception."""
    outcomes = set()
    random = np.random.default_rng(0)
    noise = Image.fromarray(random.integers(0, 255, (24, 24, 3), np.uint8))
    for form in ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "JPEG2000"):
        whole = file_bytes(noise, form)
        for turn in range(60):
            data = bytearray(whole if turn % 2 else whole[: random.integers(1, len(whole))])
            data[random.integers(0, min(len(data), 200))] = random.integers(0, 256)
            try:
                outcome = decode_picture(bytes(data), "x").mode
            except ValueError as error:
                outcome = str(error)[:3]
            outcomes.add(outcome)
    assert outcomes == {"RGB", "x: "}


# --- real scans


@pytest.mark.skipif(not SCANS.is_dir(), reason="the folder of real scans is not here")
def test_real_scans():
    notes: list[str] = []
    splits = load_splits(str(SCANS), notes=notes)
    assert [len(split) for split in splits.values()] == [30, 10, 10]
    (note,) = notes
    assert "files not used, as no row names them: 50 (50 .csv: transcripts/" in note
    assert all(set(t) <= {"company", "date", "address", "total"} for s in splits.values() for t in s.targets)
    check_split(splits["test"])
    assert splits["test"][0].id == "test/002.jpg"
    assert min(splits["test"][0].image.size) > 224
