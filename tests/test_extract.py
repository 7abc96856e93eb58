"""Pictures in, rows out: the evaluation's answers, in the order given, and none lost however the job ends."""

from __future__ import annotations

import fcntl
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, clear_error
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import PaliGemmaForConditionalGeneration, PaliGemmaProcessor

import im2json
from im2json.data.loader import AHEAD
from im2json.data.pictures import list_pictures
from im2json.files import read_lines
from im2json.inference.decode import GROUP, Answer, Decoder
from im2json.inference.slots import Slots
from im2json.jsontext import read
from im2json.scoring.confidence import Calibration, leaf_confidence


@pytest.fixture(scope="session")
def extractor(finished) -> Any:
    return im2json.Extractor.from_run(finished.path)


@pytest.fixture
def pictures(dataset) -> list[str]:
    return [f"{dataset}/train/{i}.png" for i in range(6)]


@pytest.fixture
def extract(cli, finished):
    """`extract(*arguments)` runs the command on the finished run."""

    def run(*arguments: object, source: object = finished.path) -> Any:
        return cli("im2json.__main__", "extract", source, *arguments)

    return run


def rows_of(result: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def without_by(rows: Any) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "by"} for row in rows]


# --- answers


def test_the_answers_are_those_of_the_evaluation(extractor, finished, dataset):
    wanted = [row for row in read_lines(finished.predictions_file) if (row["split"], row["stage"]) == ("test", "after")]
    rows = list(extractor(f"{dataset}/{row['id']}" for row in wanted))
    assert [row["text"] for row in rows] == [row["text"] for row in wanted]
    assert [row["id"] for row in rows] == [f"{dataset}/{row['id']}" for row in wanted]
    for row in rows:
        reading = read(row["text"])
        assert (row["json"], row["reading"], row["confidence"]) == (reading.value, reading.how, None)  # no object


def write_always(monkeypatch: pytest.MonkeyPatch, answers: list[Answer]) -> None:
    """Have the first pictures answered so, whatever the model makes of them."""
    monkeypatch.setattr(Decoder, "answers", lambda _, requests, *more: enumerate(a for a, _ in zip(answers, requests)))


def test_confidence_is_calibrated(finished, pictures, monkeypatch, tmp_path):
    """Of an answer that a model might give: this one writes no JSON."""
    answer = Answer('{"a":"b"}', [1, 2, 3], [0.0, -0.5, 0.0], [0, 6, 7])
    write_always(monkeypatch, [answer])
    folder = Path(shutil.copytree(finished.adapter, tmp_path / "adapter"))
    raw = leaf_confidence(answer.text, answer.starts, answer.logprobs)
    (row,) = im2json.Extractor.from_run(folder, check_sum="a = c")(pictures[:1])
    assert row["confidence"] == raw
    assert row["checks"] == {"a = c": None}
    (folder / "calibration.json").write_text(json.dumps({"slope": 2, "intercept": 1, "fitted_on": {"step": 4}}))
    (row,) = im2json.Extractor.from_run(folder)(pictures[:1])
    assert row["confidence"] == Calibration(2, 1).of(raw) != raw
    assert "checks" not in row


def test_an_answer_that_was_cut_says_so(extractor, pictures, monkeypatch):
    answers = [Answer("{", [1], [0.0], [0], cut=cut) for cut in (True, False)]
    write_always(monkeypatch, answers)
    cut, whole = extractor(pictures[:2])
    assert cut.pop("cut") is True
    assert {**cut, "id": whole["id"]} == whole


def test_answers_are_drafted_from_the_shape_of_the_targets(extractor, finished, pictures, tmp_path):
    """And are the same without."""
    text = extractor.decoder.collator.texts([extractor.draft])[0]
    assert json.loads(text) == {"total": "", "menu": [{"nm": ""}]}
    folder = Path(shutil.copytree(finished.adapter, tmp_path / "adapter"))
    (folder / "schema.json").write_text("{")
    bare = im2json.Extractor.from_run(folder)
    assert bare.draft == ()
    assert list(bare(pictures)) == list(extractor(pictures))


def test_batches_of_any_size_give_the_same_rows(extractor, finished, pictures):
    one_by_one = im2json.Extractor.from_run(finished.path, eval_batch_size=1)
    assert list(one_by_one(pictures)) == list(extractor(pictures))


def test_pictures_in_memory(extractor, pictures):
    rows = list(extractor(Image.open(picture) for picture in pictures[:2]))
    assert [row["id"] for row in rows] == ["0", "1"]
    assert [row["text"] for row in rows] == [row["text"] for row in extractor(pictures[:2])]
    cut = Image.open(io.BytesIO(Path(pictures[0]).read_bytes()[:-40]))  # Pillow has read no more than its header
    rows = list(extractor([pictures[0], cut, pictures[1]]))
    assert rows[1].keys() == {"id", "error"} and rows[1]["error"].startswith("1: the picture is damaged or cut short")
    assert [row["id"] for row in rows] == [pictures[0], "1", pictures[1]]


def test_no_data_set_is_opened(finished, pictures, monkeypatch):
    monkeypatch.setattr("im2json.data.sources.load_splits", None)
    monkeypatch.setattr("im2json.data.sources.open_splits", None)
    assert len(list(im2json.Extractor.from_run(str(finished.path))(pictures[:1]))) == 1


def test_an_adapter_that_peft_made_elsewhere(small_model, pictures, tmp_path):
    """Against plain transformers and PEFT, unmerged."""
    torch.manual_seed(3)
    lora = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    base = PaliGemmaForConditionalGeneration.from_pretrained(small_model, dtype=torch.float32)
    get_peft_model(base, lora).save_pretrained(str(tmp_path))
    base = PaliGemmaForConditionalGeneration.from_pretrained(small_model, dtype=torch.float32)
    model, processor = (
        PeftModel.from_pretrained(base, str(tmp_path)).eval(),
        PaliGemmaProcessor.from_pretrained(small_model),
    )
    extractor = im2json.Extractor.from_run(tmp_path, prompt="read", max_new_tokens=8)
    for row in extractor(pictures[:3]):
        inputs = processor(images=Image.open(row["id"]).convert("RGB"), text="<image>read", return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert row["text"] == processor.decode(output, skip_special_tokens=True)


def test_an_adapter_of_ours_says_how_it_was_made(finished, tmp_path):
    folder = shutil.copytree(finished.adapter, tmp_path / "adapter")
    extractor = im2json.Extractor.from_run(folder)
    assert extractor.settings.max_new_tokens == 6
    longest = im2json.Extractor.from_run(folder, max_new_tokens=10**6).settings.max_new_tokens
    assert longest == 2048 - len(extractor.decoder.collator.prefix_ids)  # positions of the small model
    assert extractor.decoder.collator.prompt == "extract JSON."


# --- the command


def test_every_kind_of_picture_keeps_its_place(extract, extractor, pictures, tmp_path):
    plain = Image.open(pictures[0]).convert("RGB")
    for name, picture in {
        "a.png": plain,
        "b.tif": plain.convert("CMYK"),
        "d.png": plain.convert("L").convert("I;16"),
        "e.png": plain.convert("RGBA"),
    }.items():
        picture.save(tmp_path / name)
    turned = plain.transpose(Image.Transpose.ROTATE_90)
    exif = turned.getexif()
    exif[274] = 6
    turned.save(tmp_path / "c.png", exif=exif)
    plain.save(tmp_path / "f.tif", save_all=True, append_images=[plain.transpose(Image.Transpose.ROTATE_180)])
    (tmp_path / "g.png").write_bytes(Path(pictures[0]).read_bytes()[:200])
    (tmp_path / "h.jpg").write_text("no picture")
    (tmp_path / "i.pdf").write_text("%PDF-1.7")
    (tmp_path / "j.webp").touch()
    (tmp_path / "k.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    (tmp_path / "l").symlink_to("nowhere")
    (tmp_path / "notes.txt").write_text("passed over")
    result = extract(tmp_path)
    assert result.exit_code == 1
    assert "6 of 12 pictures could not be read" in result.stderr
    assert "files passed over that are no pictures: 1 (1 .txt: notes.txt)" in result.stderr
    assert f"{tmp_path}/f.tif: has 2 pages, of which the first was read" in result.stderr
    rows = rows_of(result)
    assert [Path(row["id"]).name[0] for row in rows] == list("abcdefghijkl")
    assert ["error" in row for row in rows] == [False] * 6 + [True] * 6
    assert [row.get("pages") for row in rows] == [None] * 5 + [2] + [None] * 6
    assert [row.get("note") for row in rows if "note" in row] == [rows[3]["note"]]
    assert f"{tmp_path}/d.png: {rows[3]['note']}\n" in result.stderr and "is taken for white" in rows[3]["note"]
    assert all(row["error"].startswith(row["id"]) for row in rows[6:])
    (wanted,) = extractor([pictures[0]])
    for row in (rows[0], rows[2], rows[4], rows[5]):
        assert row["text"] == wanted["text"]


def test_names_folders_and_patterns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (
        "b/2.png",
        "b/1.JPG",
        "b/deep/3.tif",
        "b/.hidden/4.png",
        "b/text.txt",
        "a[1].png",
        "c.webp",
        "d/e.png/f.png",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert list_pictures(["c.webp", "b", "b/1.JPG", "missing.png"]) == [
        "c.webp", "b/1.JPG", "b/2.png", "b/deep/3.tif", "missing.png",
    ]  # fmt: skip
    assert list_pictures(["a[1].png"]) == ["a[1].png"]
    assert list_pictures(["d", "d/e.png"]) == ["d/e.png/f.png"]
    assert list_pictures(["b/**/*.tif", "*.webp"]) == ["b/deep/3.tif", "c.webp"]
    for nothing in ("*.gif", "b/.hidden/../../b/deep/none*"):
        with pytest.raises(ValueError, match="no picture there"):
            list_pictures([nothing])


def test_a_stopped_job_goes_on(extract, pictures, tmp_path):
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    missing = str(tmp_path / "missing.png")
    asked = [*pictures[:3], missing, *pictures[3:]]
    assert extract(*asked, "--out", whole).exit_code == 1
    lines = whole.read_bytes().splitlines(keepends=True)
    assert [json.loads(line)["id"] for line in lines] == asked
    for kept in (b"", lines[0][:-1], b"".join(lines[:4]) + lines[4][:20]):
        stopped.write_bytes(kept)
        assert extract(*asked, "--out", stopped).exit_code == 1
        assert stopped.read_bytes() == whole.read_bytes()
    result = extract(*asked, "--out", stopped)  # nothing is left to do, but the failure is not forgotten
    assert "1 of 7 pictures could not be read" in result.stderr
    assert stopped.read_bytes() == whole.read_bytes()


def test_shards_joined_are_the_whole(extract, pictures, tmp_path):
    """Each goes on by itself, and one without pictures is an empty file."""
    assert extract(*pictures, "--out", tmp_path / "whole").exit_code == 0
    whole = (tmp_path / "whole").read_bytes()
    for count in (1, 4, 8):
        shards = [tmp_path / f"{number} of {count}" for number in range(1, count + 1)]
        for number, shard in enumerate(shards, start=1):
            for _ in range(2):
                result = extract(*pictures, pictures[0], "--shard", f"{number}/{count}", "--out", shard)
                assert result.exit_code == 0, result.output
                stopped = shard.read_bytes()
                shard.write_bytes(stopped[:-20])
            shard.write_bytes(stopped)
        assert b"".join(shard.read_bytes() for shard in shards) == whole
        assert [len(shard.read_bytes().splitlines()) for shard in shards] == {
            1: [6], 4: [1, 2, 1, 2], 8: [0, 1, 1, 1, 0, 1, 1, 1],
        }[count]  # fmt: skip


def test_a_list_of_files_is_as_good_as_arguments(extract, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    odd = Path(shutil.copy(pictures[5], "a[12]* .png"))
    broken = Path(os.fsdecode(b"a\xe9\n.png"))
    broken.write_bytes(b"")
    Path("list").write_text("\n".join([*pictures[1:4], "", str(odd), *pictures[:3], "folder"]))
    Path("folder").mkdir()
    wanted = [*pictures[1:4], str(odd), pictures[0], "folder"]
    listed = extract("--files-from", "list")
    assert listed.exit_code == 1 and "1 of 6 pictures could not be read" in listed.stderr
    rows = rows_of(listed)
    assert [row["id"] for row in rows] == wanted and rows[-1]["error"] == "folder: is not a file"
    assert rows[:-1] == rows_of(extract(*wanted[:-1]))
    both = rows_of(extract(pictures[5], pictures[2], "--files-from", "list"))
    assert [row["id"] for row in both] == [pictures[5], pictures[2], *(id for id in wanted if id != pictures[2])]
    Path("null").write_bytes(b"".join(os.fsencode(name) + b"\0" for name in (odd, broken)))
    rows = rows_of(extract("--files-from", "null", "--null"))
    assert [row["id"] for row in rows] == [str(odd), str(broken)] and "error" in rows[1]


def test_a_list_on_the_standard_input(finished, pictures):
    from click.testing import CliRunner

    from im2json.app import main

    given = ["extract", str(finished.path), "--files-from", "-"]
    result = CliRunner().invoke(main, given, input="\n".join(pictures[:2]))
    assert [row["id"] for row in rows_of(result)] == pictures[:2]


def test_a_million_rows_are_not_held(extract, pictures, tmp_path, monkeypatch):
    """Of names, those on their way to the model alone are in memory: neither all that are listed nor all rows."""
    seen = []

    class Stub:
        def __call__(self, given: Any) -> Iterator[dict[str, Any]]:
            seen.append((type(given).__name__, len(given)))
            return ({"id": name, "json": None} for name in given)

    monkeypatch.setattr(im2json.Extractor, "from_config", lambda config: Stub())
    names, out = [f"{i} of the scans of many years.png" for i in range(20_000)], tmp_path / "rows"
    (tmp_path / "list").write_text("\n".join(names))
    tracemalloc.start()
    try:
        for half in ("1/2", "1/1"):
            assert extract("--files-from", tmp_path / "list", "--shard", half, "--out", out).exit_code == 0
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [row["id"] for row in read_lines(out)] == names
    assert seen == [("Missing", 10_000), ("Missing", 10_000)]
    assert most < 20_000 * 40  # bytes; the names alone take more than twice as many


def test_a_file_that_is_not_this_jobs(extract, pictures, tmp_path):
    out = tmp_path / "rows.jsonl"
    assert extract(pictures[0], "--out", out).exit_code == 0
    before = out.read_bytes()
    assert "rows.jsonl:1: was read with another" in clear_error(extract(*pictures, "--out", out, "--prompt", "else"))
    with out.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another process" in clear_error(extract(*pictures, "--out", out))
    assert out.read_bytes() == before
    picture = Path(shutil.copy(pictures[1], tmp_path / "picture.png"))
    assert "picture.png:1: is not a row" in clear_error(extract(pictures[0], "--out", picture))
    assert picture.read_bytes() == Path(pictures[1]).read_bytes()
    for line in ('{"total": "9.30"}', "one line of notes", '{"id": "a", "target": {}}'):
        picture.write_text(line)  # no newline behind it, as behind a row that was cut short
        assert "picture.png:1: is not a row" in clear_error(extract(pictures[0], "--out", picture))
        assert picture.read_text() == line


def test_errors_are_one_line(extract, finished, pictures, tmp_path, monkeypatch):
    assert "holds no adapter" in clear_error(extract(pictures[0], source=tmp_path))
    schema = tmp_path / "mine.json"
    schema.write_text('{"type": "object", "properties": {"a": {"type": "string", "format": "no such"}}}')
    assert "--schema goes with --constrain" in clear_error(extract(pictures[0], "--schema", schema))
    error = clear_error(extract(pictures[0], "--schema", schema, "--constrain"))
    assert error.startswith(f"schema {schema} cannot be decoded by: ")
    folder = Path(shutil.copytree(finished.adapter, tmp_path / "adapter"))
    config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert "give --model" in clear_error(extract(pictures[0], source=folder))
    assert "no such folder" in clear_error(extract(pictures[0], "--model", tmp_path / "none", source=folder))
    assert extract(pictures[0], "--model", finished.read_config().model.model, source=folder).exit_code == 0

    def unreachable(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("no route")

    monkeypatch.setattr("im2json.model.hub.hf_hub_download", unreachable)
    assert "the hub could not be reached: no route" in clear_error(extract(pictures[0], source="some/adapter"))


def test_an_adapter_on_the_hub(extract, finished, pictures, tmp_path, monkeypatch):
    """With its run's calibration and schema where they are there."""
    asked_for = set()

    def from_folder(model: str, file: str) -> str:
        assert model == "some/adapter"
        asked_for.add(file)
        if not (finished.adapter / file).exists():
            raise EntryNotFoundError("404")
        return str(shutil.copy(finished.adapter / file, tmp_path / file))

    monkeypatch.setattr("im2json.model.hub.hf_hub_download", from_folder)
    found, own = extract(pictures[0], source="some/adapter"), extract(pictures[0])
    assert found.exit_code == 0, found.output
    assert without_by(rows_of(found)) == without_by(rows_of(own))
    assert {"calibration.json", "schema.json"} <= asked_for


def test_help_is_fast_and_public_names_are_lazy():
    code = "import sys, im2json, im2json.__main__; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    with pytest.raises(AttributeError, match="nothing"):
        _ = im2json.nothing


def test_pictures_are_loaded_before_there_is_a_slot_for_them(extractor, pictures, monkeypatch):
    begun = [threading.Event() for _ in pictures]
    load, advance = im2json.Extractor._load, Slots.advance

    def loading(self: Any, numbered: tuple[int, Any]) -> Any:
        begun[numbered[0]].set()
        return load(self, numbered)

    def waiting(*given: Any) -> None:
        assert all(one.wait(20) for one in begun)
        advance(*given)

    monkeypatch.setattr(im2json.Extractor, "_load", loading)
    monkeypatch.setattr(Slots, "advance", waiting)
    monkeypatch.setattr(extractor.decoder, "slots", 2)
    assert len(list(extractor(pictures))) == 6


def test_the_callers_code_may_use_the_same_extractor(extractor, pictures, monkeypatch):
    monkeypatch.setattr(extractor.decoder, "slots", 2)
    graded: list[bool] = []

    def ids(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
        for row in rows:
            graded.append(torch.is_grad_enabled())
            yield row["id"]

    alone = list(extractor(pictures))
    assert list(extractor(ids(extractor(pictures)))) == alone
    for row, wanted in zip(extractor(pictures), alone, strict=True):
        assert row == wanted
        assert list(extractor(pictures[:1])) == alone[:1]
    assert graded == [True] * 6


@pytest.mark.parametrize("bad", [1, 2, 3, 6])
def test_batches_of_nothing_but_bad_pictures(extractor, pictures, tmp_path, monkeypatch, bad):
    broken = [str(tmp_path / f"{i}.png") for i in range(bad)]
    monkeypatch.setattr(extractor.decoder, "slots", 2)
    rows = list(extractor(broken + pictures[:1]))
    assert [row["id"] for row in rows] == broken + pictures[:1]
    assert ["error" in row for row in rows] == [True] * bad + [False]


def test_bad_pictures_are_shown_as_they_come(extractor, pictures):
    """And what nobody waits for any more is not loaded."""
    asked = io.StringIO()
    rows = extractor(asked.write("x") and str(i) for i in range(1_000))
    assert "error" in next(rows)
    assert len(asked.getvalue()) <= AHEAD + 2
    rows.close()
    rows = list(extractor([*map(str, range(50)), pictures[0], *map(str, range(50, 90))]))
    assert [row["id"] for row in rows] == [*map(str, range(50)), pictures[0], *map(str, range(50, 90))]
    assert ["error" in row for row in rows] == [True] * 50 + [False] + [True] * 40


@pytest.mark.slow
def test_a_hundred_thousand_pictures_are_not_held(extractor, pictures, monkeypatch):
    """Ten thousand, and how many are read ahead."""
    monkeypatch.setattr(extractor.decoder, "slots", 8)
    read_ahead = io.StringIO()
    for n, _ in zip(range(300), extractor(read_ahead.write("x") and pictures[i % 6] for i in range(10_000))):
        assert len(read_ahead.getvalue()) <= n + 1 + AHEAD + 8 + GROUP["cpu"]
