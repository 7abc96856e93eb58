"""Names that are not UTF-8, byte-order marks, `~`, odd prompts, and texts that are too long to print."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import unicodedata

import pytest
from helpers import clear_error, prediction
from PIL import Image
from transformers import PaliGemmaProcessor

from im2json.data.check import check_split
from im2json.data.sources import load_splits
from im2json.data.stored import read_file
from im2json.families import open_collator
from im2json.files import append_lines, json_line, read_json, read_lines, write_json
from im2json.options import TrainConfig
from im2json.report.page import html_page
from im2json.runs import RunFolder, check_folder
from im2json.text import command_line, shortened

LATIN1 = os.fsdecode(b"caf\xe9")
NFC, NFD = (unicodedata.normalize(form, "caf\u00e9.png") for form in ("NFC", "NFD"))
BOM = "\ufeff".encode()


def picture_folder(folder, names, target="1"):
    """Write pictures, each with a .json of its name beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / f"{name}.png", "PNG")
        (folder / f"{name}.json").write_text(json.dumps({"total": target}))
    return folder


# --- names that are not UTF-8


@pytest.mark.parametrize(
    "word", ["plain", "my run", "it's", "$HOME", "a\nb", "~", "", "*", LATIN1, f"{LATIN1}'s \\ $x"]
)
def test_a_command_line_is_read_by_a_shell_as_its_words(word):
    printed = subprocess.run(["bash", "-c", f"printf '%s\\0' {command_line('x', word)}"], capture_output=True).stdout
    assert printed == b"x\0" + os.fsencode(word) + b"\0"


def test_files_of_ours_hold_any_name_as_utf_8_and_give_it_back(tmp_path):
    row = {"name": LATIN1, "nice": "né"}
    write_json(tmp_path / "a.json", row)
    append_lines(tmp_path / "b.jsonl", [row])
    for file in tmp_path.iterdir():
        assert "né" in file.read_text("utf-8") and r"caf\udce9" in file.read_text("utf-8")
    assert read_json(tmp_path / "a.json") == row == json.loads(json_line(row))
    assert list(read_lines(tmp_path / "b.jsonl")) == [row]
    assert r"<h1>caf\udce9</h1>" in html_page(LATIN1, "", "").encode("utf-8").decode()


def test_a_run_on_a_folder_whose_name_is_not_utf_8(train, cli, tmp_path):
    folder = tmp_path / LATIN1
    for split, names in {"train": [LATIN1, "b", "c", "d"], "validation": ["e"], "test": [f"{LATIN1} 2"]}.items():
        picture_folder(folder / split, names, target=split)
    run = train(tmp_path / "run", "--dataset", folder, "--steps", 1, "--eval-every", 1)
    assert run.read_config().data.dataset == str(folder)
    assert {row.id for row in run.predictions("test")} == {f"test/{LATIN1} 2.png"}
    for file in (run.config, run.predictions_file, run.report):
        file.read_text("utf-8")
    assert r"caf\udce9 2.png" in run.report.read_text("utf-8")
    result = cli("train", "--output", tmp_path / LATIN1 / "run", "--dataset", folder)
    assert "is not UTF-8; choose a folder whose whole path is" in clear_error(result)
    with pytest.raises(ValueError, match=r"^--out .* is not UTF-8"):
        check_folder(tmp_path / LATIN1, "--out")


@pytest.mark.parametrize("encoding", ["utf-8:strict", "ascii:strict"])
def test_a_terminal_can_show_any_name(encoding, tmp_path):
    (tmp_path / f"{LATIN1}.jsonl").write_text('{"id": "x", "prediction": "{}", "target": {"é": "1"}}\n{}\n', "utf-8")
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "evaluate.py", "--predictions", str(tmp_path / f"{LATIN1}.jsonl")]
    done = subprocess.run(command, capture_output=True, env=environment)
    assert done.returncode == 1
    shown = b"caf?" if encoding.startswith("ascii") else rb"caf\udce9"  # click has a way of its own with ASCII
    assert shown + b".jsonl:2: neither prediction nor text" in done.stderr and b"field_f1" in done.stdout


def test_a_text_option_is_utf_8_and_a_path_option_a_path(cli):
    result = cli("train", "--prompt", "bad\udcff")
    assert result.exit_code == 2 and "'--prompt': 'bad\\udcff' is not UTF-8 text" in result.stderr
    assert TrainConfig.resolve({"dataset": LATIN1}).data.dataset == LATIN1
    for bad in ("", "a\0b", "\ud800"):
        with pytest.raises(ValueError, match=r"^--dataset: .* cannot be the name of a file$"):
            TrainConfig.resolve({"dataset": bad})


# --- names that differ in their normal form


def test_a_name_in_another_normal_form_is_found(tmp_path):
    folder = tmp_path / unicodedata.normalize("NFD", "é") / "train"
    folder.mkdir(parents=True)
    for i, name in enumerate([NFD, "x.png", "y.png"]):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / name)
    rows = [{"file_name": name, "target": {"a": "1"}} for name in (NFC, "x.png", "y.png")]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = load_splits(str(tmp_path / unicodedata.normalize("NFD", "é")))
    check_split(*splits.values())
    other = tmp_path / unicodedata.normalize("NFC", "é") / "train" / NFC  # the folder in another form too
    assert read_file(other, "x") == (folder / NFD).read_bytes()
    (folder / NFC).write_bytes(b"the exact one")
    assert read_file(folder / NFC, "x") == b"the exact one" != read_file(folder / NFD, "x")
    with pytest.raises(ValueError, match="there is no such picture file"):
        read_file(folder / "thé.png", "thé.png")


def test_pairs_whose_names_differ_in_their_normal_form(tmp_path):
    picture_folder(tmp_path, ["b", "c", "d", NFC[:-4], NFD[:-4]])
    assert sum(map(len, load_splits(str(tmp_path)).values())) == 5  # each with the exact one
    (tmp_path / f"{NFC[:-4]}.json").unlink()
    (tmp_path / NFD).unlink()
    splits = load_splits(str(tmp_path))
    check_split(*splits.values())
    assert sum(map(len, splits.values())) == 4


# --- byte-order marks


def test_a_byte_order_mark_is_accepted_wherever_text_is_read(cli, tmp_path):
    folder = picture_folder(tmp_path / "pairs", ["a", "b", "c"])
    for file in folder.glob("*.json"):
        file.write_bytes(BOM + file.read_bytes())
    lines = "".join(json.dumps({"file_name": f"pairs/{x}.png", "target": {"a": x}}) + "\n" for x in "abc")
    (tmp_path / "lines.jsonl").write_bytes(BOM + lines.encode())
    for data in (folder, tmp_path / "lines.jsonl"):
        check_split(*load_splits(str(data)).values())
    (tmp_path / "grid.json").write_bytes(BOM + b'{"grid": {"r": [4, 8]}}')
    assert cli("sweep", tmp_path / "grid.json", "--dry-run", "--output", tmp_path / "sweep").exit_code == 0
    (tmp_path / "predictions.jsonl").write_bytes(BOM + b'{"id": "x", "prediction": "{}"}\n')
    (tmp_path / "targets.jsonl").write_bytes(BOM + b'{"id": "x", "target": {}}\n')
    files = ("--predictions", tmp_path / "predictions.jsonl", "--targets", tmp_path / "targets.jsonl")
    assert cli("evaluate", *files).exit_code == 0
    run = RunFolder(tmp_path)
    run.write_config(TrainConfig.resolve({}))
    run.config.write_bytes(BOM + run.config.read_bytes())
    run.predictions_file.unlink()
    append_lines(run.predictions_file, [prediction({"text": "{}", "target": {}}).to_json()])
    run.predictions_file.write_bytes(BOM + run.predictions_file.read_bytes())
    assert run.read_config() == TrainConfig.resolve({}) and len(list(run.predictions())) == 1


def test_utf_16_is_refused_once_with_what_to_do(cli, tmp_path):
    lines = "".join(json.dumps({"file_name": f"{x}.png", "target": {"a": x}}) + "\n" for x in "abc")
    path = tmp_path / "lines.jsonl"
    path.write_bytes(lines.encode("utf-16"))
    for command in (("train", "--check", "--dataset", path), ("evaluate", "--predictions", path), ("sweep", path)):
        assert clear_error(cli(*command)) == f"{path}: is UTF-16 or UTF-32 text; save it as UTF-8"


# --- ~


def test_a_tilde_is_expanded_in_every_path(cli, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = TrainConfig.resolve(dict.fromkeys(("dataset", "model", "adapter", "schema", "output"), "~/x"))
    values = config.flat()
    assert all(values[name] == str(tmp_path / "x") for name in ("dataset", "model", "adapter", "schema", "output"))
    assert TrainConfig.resolve({"prompt": "~/x"}).data.prompt == "~/x"
    (tmp_path / "p.jsonl").write_text('{"id": "x", "prediction": "{}", "target": {}}\n')
    assert cli("evaluate", "--predictions=~/p.jsonl").exit_code == 0
    (tmp_path / "grid.json").write_text('{"base": {"dataset": "~/data"}, "grid": {"r": [4]}}')
    listed = cli("sweep", "~/grid.json", "--list", "--output=~/sweep").stdout
    assert f"--dataset {tmp_path}/data" in listed and f"--output {tmp_path}/sweep" in listed
    for flag in ("--resume", "--adapter"):
        assert f"{flag} {tmp_path}/nothing" in clear_error(cli("train", f"{flag}=~/nothing"))


# --- prompts


@pytest.mark.parametrize("prompt", ["<eos>", "<bos>answer", "<image> extract", "a <pad>", "<unk>"])
def test_a_special_token_in_a_prompt_is_refused(small_model, prompt):
    with pytest.raises(ValueError, match=r"^--prompt '.*': leave <\w+> out, a special token$"):
        open_collator(small_model, prompt)


@pytest.mark.parametrize("prompt", ["", " ", "two\nlines", "a\n", "tab\there", "a <loc0001>", "\u202eRTL", "e\u0301"])
def test_a_prompt_is_the_same_tokens_for_plain_transformers(small_model, prompt):
    """Training, evaluation and extraction take the collator's; an exported model takes its processor's."""
    processor = PaliGemmaProcessor.from_pretrained(small_model)
    plain = processor(images=Image.new("RGB", (8, 8)), text=f"<image>{prompt}", return_tensors="pt")
    assert open_collator(small_model, prompt).prefix_ids == plain["input_ids"][0].tolist()


# --- texts that are too long


def test_an_inline_picture_or_an_address_is_refused_without_being_printed(cli, tmp_path):
    inline = "data:image/png;base64," + base64.b64encode(os.urandom(9000)).decode()
    images = [inline, inline.partition(",")[2], "https://example.com/a.png"]
    rows = [{"image": image, "target": {"a": "1"}} for image in images]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = cli("train", "--check", "--dataset", tmp_path / "lines.jsonl", "--output", tmp_path / "c.html")
    assert result.exit_code == 1
    assert len(result.output) < 3000
    assert "in place of a path; store the picture as a file" in result.output
    assert "'https://example.com/a.png' is an address; download the picture and give its path" in result.output


def test_shortened():
    assert shortened("short", 5) == "short"
    assert shortened("x" * 12_000, 3) == "xxx... (12,000 characters)"
