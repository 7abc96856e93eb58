"""Mistakes that users make with each command: one line that names the file or option, and no traceback. A bug of ours:
its traceback, and how to report it."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
from helpers import ROOT, clear_error

from im2json.cli import REPORT, user_errors
from im2json.errors import UserError


@dataclass(frozen=True)
class Mistake:
    """A command, and what it stops with. {run} is a copy of a finished run, {tmp} a folder of the test's own, {data} a
    data set, {model} a small model."""

    command: str  # the script and its arguments
    says: str  # a part of the error
    broken: str = ""  # a file to write first
    content: bytes = b'{"a": '


NOT_JSON = "is not JSON: Expecting value"
TRAIN = "train --model {model} --output {tmp}/new --precision fp32 --quant none --steps 1 --no-test --eval-every 0"
MISTAKES = {
    # files of a run
    "resume what is no run": Mistake("train --resume {tmp}", "--resume {tmp} is not a run folder"),
    "resume into another folder": Mistake(
        "train --resume {run} --steps 9 --output {tmp}/new", "--resume {run} goes on in that folder: leave --output out"
    ),
    "resume a config that was cut": Mistake("train --resume {run}", f"config.json: {NOT_JSON}", "{run}/config.json"),
    "resume a config of something else": Mistake(
        "train --resume {run}", "config.json does not hold a run's options", "{run}/config.json", b"[1]"
    ),
    "resume a config in another encoding": Mistake(
        "train --resume {run}", "config.json: is not UTF-8 text", "{run}/config.json", b'{"caf\xe9": 1}'
    ),
    "resume options that do not exist": Mistake(
        "train --resume {run}", "unknown option 'warp'", "{run}/config.json", b'{"options": {"warp": 9}}'
    ),
    "resume after lines of something else": Mistake(
        "train --resume {run} --steps 9", "metrics.jsonl:1: is not a line that a run writes", "{run}/metrics.jsonl",
        b'{"split": "train"}\n',
    ),
    "evaluate a result that was cut": Mistake("evaluate {run} --precision fp32", f"result.json: {NOT_JSON}",
                                              "{run}/result.json"),
    "compare predictions that were cut": Mistake(
        "evaluate {run} --against {run}", f"predictions.jsonl:1: {NOT_JSON}", "{run}/predictions.jsonl", b'{"a": \n'
    ),
    "compare lines of something else": Mistake(
        "evaluate {run} --against {run}", "predictions.jsonl:1: is not a line that a run writes",
        "{run}/predictions.jsonl", b'{"split": "test", "stage": "after"}\n',
    ),
    "extract by a calibration that was cut": Mistake(
        "extract {run} {data}/test/0.png", f"calibration.json: {NOT_JSON}", "{run}/calibration.json"
    ),
    "extract by a calibration of something else": Mistake(
        "extract {run} {data}/test/0.png", "calibration.json does not hold a calibration", "{run}/calibration.json",
        b"{}",
    ),
    "extract by a schema that was cut": Mistake(
        "extract {run} {data}/test/0.png --constrain", f"schema.json: {NOT_JSON}", "{run}/schema.json"
    ),
    "export a result of something else": Mistake(
        "export {run} --out {tmp}/out", "result.json is not what a finished run writes", "{run}/result.json", b"{}"
    ),
    "export over something": Mistake("export {run} --out {tmp}", "{tmp} exists already"),
    "export what is no run": Mistake("export {tmp} --out {tmp}/out", "{tmp} is not a run folder"),
    "compare targets of another kind": Mistake(
        "evaluate {run} --against {run}", "predictions.jsonl:1: is not a line that a run writes (target is [1])",
        "{run}/predictions.jsonl",
        b'{"step": 1, "split": "test", "stage": "after", "id": "a", "text": "{}", "target": [1]}\n',
    ),
    "resume a config whose parts are of another kind": Mistake(
        "train --resume {run} --steps 9", "config.json: changes is 5", "{run}/config.json",
        b'{"options": {"steps": 4}, "changes": 5}',
    ),
    "evaluate a folder in place of a file": Mistake(
        "evaluate {run} --against {run}", "predictions.jsonl", "{run}/predictions.jsonl/x"
    ),
    "extract a list that is not text": Mistake(
        "extract {run} --files-from {tmp}/list", "--files-from {tmp}/list:2: is not UTF-8 text (byte 3)", "{tmp}/list",
        b"a.png\ncaf\xe9.png\n",
    ),
    "extract a list of nothing": Mistake(
        "extract {run} --files-from {tmp}/list", "--files-from {tmp}/list: names no picture", "{tmp}/list", b"\n\n"
    ),
    "extract into a folder that is not there": Mistake(
        "extract {run} {data}/test/0.png --out {tmp}/none/rows", "--out {tmp}/none/rows cannot be opened"
    ),
    "extract into a folder that is a file": Mistake(
        "extract {run} {data}/test/0.png --out {tmp}/file/rows", "--out {tmp}/file/rows cannot be opened", "{tmp}/file"
    ),
    # adapters
    "start from no adapter": Mistake(f"{TRAIN} --adapter {{tmp}}", "--adapter {tmp} holds no adapter"),
    "start from an adapter config that was cut": Mistake(
        f"{TRAIN} --adapter {{run}}", f"adapter_config.json: {NOT_JSON}",
        "{run}/adapter/adapter_config.json",
    ),
    "start from an adapter config of something else": Mistake(
        f"{TRAIN} --adapter {{run}}", "describes no LoRA adapter", "{run}/adapter/adapter_config.json",
        b'{"peft_type": "LORA", "r": "many"}',
    ),
    "extract by a use of something else": Mistake(
        "extract {run} {data}/test/0.png", "im2json.json does not hold an object", "{run}/adapter/im2json.json", b"[]"
    ),
    # data
    "train on nothing": Mistake(f"{TRAIN} --dataset {{tmp}}/none", "--dataset {tmp}/none: there is no such folder"),
    "train on a saved data set that was cut": Mistake(
        f"{TRAIN} --dataset {{tmp}}", "{tmp}: cannot be loaded as what save_to_disk writes", "{tmp}/dataset_dict.json"
    ),
    "extract nothing": Mistake("extract {run} {tmp}", "{tmp}: no picture there"),
    "extract into something else": Mistake(
        "extract {run} {data}/test/0.png --out {tmp}/rows", "--out {tmp}/rows:1: is not a row", "{tmp}/rows", b"text\n"
    ),
    # options
    "a schema that was cut": Mistake(
        f"{TRAIN} --dataset {{data}} --constrain --schema {{tmp}}/s.json", f"s.json: {NOT_JSON}", "{tmp}/s.json"
    ),
    "a model that is a file": Mistake("train --model {tmp}/m --output {tmp}/new --dataset {data}", "this is a file",
                                      "{tmp}/m"),
    "a model of something else": Mistake(
        "train --model {tmp}/m --output {tmp}/new --dataset {data}", "the folder does not load as a model",
        "{tmp}/m/config.json",
    ),
    "a name that the hub refuses": Mistake("train --model a--b/c --dataset {data}", "--model a--b/c: no such folder"),
    "a seed that is too large": Mistake("train --resume {run}", "--seed: 4294967296 is too large", "{run}/config.json",
                                        b'{"options": {"seed": 4294967296}}'),
    "a schema with NaN": Mistake(
        f"{TRAIN} --dataset {{data}} --constrain --schema {{tmp}}/s.json", "s.json: is not JSON", "{tmp}/s.json",
        b'{"type": "object", "properties": {"a": {"const": NaN}}}',
    ),
    "no regular expression": Mistake(f"{TRAIN} --dataset {{data}} --target-modules (", "is not a regular expression"),
    "no equation": Mistake(f"{TRAIN} --dataset {{data}} --check-sum total", "is no equation of paths"),
    "a picture token in the prompt": Mistake(f"{TRAIN} --dataset {{data}} --prompt <image>", "leave <image> out"),
    "check into something else": Mistake("train --check --dataset {data} --model {model} --output {tmp}/x",
                                         "{tmp}/x exists", "{tmp}/x"),
    "plan on nothing": Mistake("train --plan --dataset {tmp}/none", "--dataset {tmp}/none: there is no such folder"),
    # grids
    "a grid that was cut": Mistake("sweep {tmp}/g.json", f"g.json: {NOT_JSON}", "{tmp}/g.json"),
    "a grid of something else": Mistake("sweep {tmp}/g.json", "g.json: a grid is a JSON object", "{tmp}/g.json", b"[]"),
    "a grid with a wrong value": Mistake(
        "sweep {tmp}/g.json --output {tmp}/s", "g.json: grid.r: 0 is too small", "{tmp}/g.json", b'{"grid": {"r": [0]}}'
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_line(cli, finished, small_model, dataset, tmp_path, mistake):
    names = {"run": str(tmp_path / "run"), "tmp": str(tmp_path / "tmp"), "data": dataset, "model": small_model}
    (tmp_path / "tmp").mkdir()
    if "{run}" in mistake.command:
        shutil.copytree(finished.path, names["run"])
    if mistake.broken:
        file = Path(mistake.broken.format(**names))
        if file.parent.is_file():
            file.parent.unlink()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(mistake.content)
    script, *arguments = (part.format(**names) for part in mistake.command.split())
    if script in ("extract", "export"):
        script, arguments = "im2json.__main__", [script, *arguments]
    error = clear_error(cli(script, *arguments))
    assert mistake.says.format(**names) in error


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ("", "give PICTURES, --files-from, or both"),
        ("a.png --null", "--null goes with --files-from"),
        ("a.png --shard 0/4", "--shard 0/4: expected I/N with 1 <= I <= N"),
        ("--files-from none", "File 'none' does not exist"),
    ],
)
def test_flags_of_extract_that_do_not_fit_together(cli, finished, flags, problem):
    result = cli("im2json.__main__", "extract", finished.path, *flags.split())
    assert result.exit_code == 2 and problem in result.stderr


# --- bugs


def caught(error: Exception) -> Exception:
    try:
        with user_errors():
            raise error
    except Exception as found:
        return found


def test_a_users_mistake_has_no_traceback_and_a_bug_has():
    assert isinstance(caught(UserError("--r: too small")), click.ClickException)
    for bug in (ValueError("not enough values to unpack"), KeyError("x"), FileNotFoundError(errno.ENOENT, "gone", "x")):
        found = caught(bug)
        assert found is bug and found.__notes__ == [REPORT]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO, errno.EDQUOT, errno.EISDIR])
def test_what_the_system_refuses_is_no_bug(code):
    found = caught(OSError(code, "refused", "/some/file"))
    assert isinstance(found, click.ClickException) and "/some/file" in found.message


def test_a_bug_in_a_command_is_told_with_how_to_report_it(tmp_path):
    grid = tmp_path / "grid.json"
    grid.write_text('{"grid": {"r": [8]}}')
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import sweep\nimport im2json.sweeps.grid as grid\n"
        "def wrong(*given):\n    a, b = (1,)\n"
        "grid.make_plan = wrong\nsweep.main()"
    )
    done = subprocess.run([sys.executable, "-c", program, str(grid)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "not enough values to unpack" in done.stderr
    assert done.stderr.splitlines()[-1] == REPORT
