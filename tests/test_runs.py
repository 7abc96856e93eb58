"""Run folders: whole whatever happens while they are written, and never two writers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from im2json.files import append_lines, atomically, damage, folder_atomically, keep_lines, read_lines, write_json
from im2json.options import TrainConfig
from im2json.records import SplitRecord
from im2json.resume import evaluated_config, fresh_options, reading_digest, resumed_config
from im2json.runs import (
    RunFolder,
    check_output,
    claim_new,
    claim_stopped,
    complete_checkpoints,
    locked,
    new_run,
    rewind,
)

NO_SPLITS = SplitRecord({"train": {}, "validation": {}, "test": {}}, {})


def config(**values) -> TrainConfig:
    return TrainConfig.resolve(values)


@pytest.fixture
def run(tmp_path) -> RunFolder:
    return begun(config(output=str(tmp_path / "run"), r=8))


def begun(config: TrainConfig) -> RunFolder:
    run = new_run(config)
    claim_new(run, config, NO_SPLITS, data={})
    return run


def test_config_json_holds_every_option_and_the_versions(run):
    stored = json.loads(run.config.read_text("utf-8"))
    assert stored["options"] == config(output=str(run.path), r=8).flat()
    assert stored["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"im2json", "torch", "transformers", "peft", "bitsandbytes", "accelerate"} <= stored["versions"].keys()
    assert re.fullmatch(r"[0-9a-f]{40}\+?", stored["git"] or "0" * 40)
    assert run.read_config() == config(output=str(run.path), r=8)


def test_fresh_names_differ_within_a_second(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [begun(config(r=4)) for _ in range(4)]
    assert len({run.path for run in runs}) == 4
    assert all(run.path.parent == Path("runs") and run.path.name.startswith("tiny-r4-") for run in runs)
    assert all(run.read_config().model.r == 4 for run in runs)


def test_an_output_that_holds_a_run_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match=r"unfinished run: go on with --resume"):
        check_output(str(run.path))
    write_json(run.result, {})
    assert run.done
    with pytest.raises(ValueError, match="finished run: choose another"):
        check_output(str(run.path))
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file", "dangling"):
        with pytest.raises(ValueError, match=f"--output .*{name} is not a folder"):
            check_output(str(tmp_path / name))
    with pytest.raises(ValueError, match="--output /proc/x/run cannot be made"):
        new_run(config(output="/proc/x/run"))
    (tmp_path / "runs").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        with pytest.raises(ValueError, match="give --output"):
            check_output(None)
    with pytest.raises(ValueError, match=r"--output .*file is not a folder that can be written to"):
        check_output(str(tmp_path / "file" / "run"))
    (tmp_path / "empty").mkdir()
    for fine in (None, str(tmp_path / "new"), str(tmp_path / "empty")):
        check_output(fine)


def test_a_folder_that_another_process_took_or_finished_meanwhile_is_refused(tmp_path):
    one, other = config(output=str(tmp_path / "run"), r=8), config(output=str(tmp_path / "run"), r=4)
    run, same = new_run(one), new_run(other)  # both found it free
    claim_new(run, one, NO_SPLITS, data={})
    with pytest.raises(ValueError, match="holds an unfinished run"):
        claim_new(same, other, NO_SPLITS, data={})
    assert run.read_config() == one
    claim_stopped(run, one, data={})
    write_json(run.result, {})
    with pytest.raises(ValueError, match="has finished this run meanwhile"):
        claim_stopped(run, one, data={})


@pytest.mark.parametrize("text", [None, "{", "[]", "{}", '{"options": 3}', '{"options": {"rr": 3}}'])
def test_a_folder_without_a_run_is_refused_in_one_line(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json|unknown option") as error:
        RunFolder(tmp_path).read_config()
    assert "\n" not in str(error.value)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"a": "é"})
    assert json.loads(path.read_text("utf-8")) == {"a": "é"}

    def crash():
        with atomically(path) as aside:
            aside.write_text("half")
            assert json.loads(path.read_text("utf-8")) == {"a": "é"}  # while it is being written, too
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        crash()
    assert json.loads(path.read_text("utf-8")) == {"a": "é"}
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]


def test_a_folder_is_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "checkpoints" / "step-5"

    def crash():
        with folder_atomically(path) as aside:
            (aside / "old").touch()
            assert complete_checkpoints(path.parent) == []
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        crash()
    assert not path.exists()
    with folder_atomically(path) as aside:
        (aside / "new").touch()
    assert sorted(p.name for p in path.iterdir()) == ["checksums.json", "new"]
    assert damage(path) is None
    (path / "new").write_text("other")
    assert damage(path) == "new is not as it was written"
    assert [p.name for p in path.parent.iterdir()] == ["step-5"]


def test_checkpoints_come_in_the_order_of_their_steps(run):
    assert run.latest_checkpoint() is None
    for name in (".step-200.tmp", "step-x", "step-3.tmp"):
        (run.checkpoints / name).mkdir(parents=True)
    for name in ("step-9", "step-10", "step-100"):
        with folder_atomically(run.checkpoints / name):
            pass
    assert [path.name for path in complete_checkpoints(run.checkpoints)] == ["step-9", "step-10", "step-100"]
    assert run.latest_checkpoint() == run.checkpoints / "step-100"
    (run.checkpoints / "step-100" / "checksums.json").unlink()
    assert run.latest_checkpoint() == run.checkpoints / "step-10"


def test_lines_are_appended_kept_and_a_cut_one_is_passed_over(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert list(read_lines(path)) == []
    append_lines(path, [{"n": 0}, {"n": 1}])
    append_lines(path, ({"n": n, "text": "é\n\u2028"} for n in (2, 3)))
    assert [row["n"] for row in read_lines(path)] == [0, 1, 2, 3]
    assert list(read_lines(path))[3]["text"] == "é\n\u2028"
    with path.open("a") as file:
        file.write('{"n": 4, "te')
    assert [row["n"] for row in read_lines(path)] == [0, 1, 2, 3]
    append_lines(tmp_path / "odd", [{"id": "caf\udce9", "text": "\ud83d é"}])
    assert list(read_lines(tmp_path / "odd")) == [{"id": "caf\udce9", "text": "\ud83d é"}]
    keep_lines(path, lambda row: row["n"] != 1)
    append_lines(path, [{"n": 5}])
    assert [row["n"] for row in read_lines(path)] == [0, 2, 3, 5]


def test_rewinding_drops_what_came_after_the_checkpoint(run):
    rows = [
        {"step": 0, "stage": "before"}, {"step": 1}, {"step": 2, "stage": "during"}, {"step": 3},
        {"step": 4, "stage": "during"}, {"step": 2, "stage": "after"},
    ]  # fmt: skip
    for path in (run.metrics_file, run.predictions_file):
        append_lines(path, rows)
    run.adapter.mkdir()
    debris = [
        run.checkpoints / ".step-4.tmp", run.adapter / ".adapter_model.safetensors.tmp-7",
        run.path / ".during-validation.tmp-7",
    ]  # fmt: skip
    debris[0].mkdir(parents=True)
    with folder_atomically(run.checkpoints / "step-2"):
        pass
    for path in debris[1:]:
        path.touch()
    rewind(run, 2)
    for path in (run.metrics_file, run.predictions_file):
        assert list(read_lines(path)) == rows[:3]
    assert not any(path.exists() for path in debris)
    assert run.latest_checkpoint() == run.checkpoints / "step-2"


def test_one_process_at_a_time_works_on_a_run(run):
    attempt = (
        "import sys, pathlib\nfrom im2json.runs import RunFolder, locked\n"
        "with locked(RunFolder(pathlib.Path(sys.argv[1])), True): print('mine')"
    )

    def another() -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-c", attempt, str(run.path)], capture_output=True, text=True)

    with locked(run, True):
        refused = another()
        assert refused.returncode == 1
        assert f"another process is working on {run.path}" in refused.stderr
        with locked(run, False):  # the other processes of the same run
            pass
    assert another().stdout == "mine\n"
    killed = attempt.replace("print('mine')", "import os; os.kill(os.getpid(), 9)")
    crash = subprocess.run([sys.executable, "-c", killed, str(run.path)])
    assert crash.returncode == -9
    assert another().stdout == "mine\n"


def test_resuming_takes_the_options_that_the_run_began_with(run):
    stored = run.read_config()
    assert resumed_config(run, {}) == stored
    assert resumed_config(run, {"r": 8, "lr": stored.train.lr}) == stored
    changed = resumed_config(run, {"microbatch": 2, "keep": 7, "threads": 1})
    assert (changed.train.microbatch, changed.train.keep, changed.train.threads) == (2, 7, 1)
    assert changed.replace(microbatch=stored.train.microbatch, keep=stored.train.keep, threads=None) == stored
    with pytest.raises(ValueError, match=r"--r was 8, not 4, --lr was 0.005, not 0.1") as error:
        resumed_config(run, {"r": 4, "lr": 0.1, "keep": 3})
    assert "--keep" not in str(error.value)
    with pytest.raises(ValueError, match=r"--model was tiny, not google/paligemma-3b-pt-224"):
        resumed_config(run, {}, "cord")
    write_json(run.result, {})
    with pytest.raises(ValueError, match="finished"):
        resumed_config(run, {})


def test_an_evaluation_writes_answers_as_long_as_those_of_training(run):
    assert evaluated_config(run, {}).decode.max_new_tokens is None  # an older version did not keep it
    run.adapter.mkdir()
    write_json(run.adapter / "im2json.json", {"max_new_tokens": 77})
    assert evaluated_config(run, {}).decode.max_new_tokens == 77
    run.write_config(config(max_new_tokens=5))
    assert evaluated_config(run, {}).decode.max_new_tokens == 5


def test_resuming_with_the_relative_path_that_the_run_began_with(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    given = {"dataset": "data", "output": "run"}
    run = begun(TrainConfig.resolve(fresh_options(given)))
    assert run.read_config().data.dataset == str(tmp_path / "data")
    assert resumed_config(run, {"dataset": "data"}).data.dataset == str(tmp_path / "data")


def test_folders_named_like_the_embedded_base_and_receipts_are_not_taken_for_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "receipts", "other"):
        Path(name).mkdir()
    embedded = {"model": "tiny", "dataset": "receipts"}
    assert fresh_options(embedded) == embedded
    other = str(tmp_path / "other")
    assert fresh_options({"model": "other", "dataset": "other"}) == {"model": other, "dataset": other}


def test_resuming_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere: there is no such run folder"):
        resumed_config(RunFolder(tmp_path / "nowhere"), {})


def test_the_digest_of_what_reads_a_picture_is_that_of_earlier_versions(tmp_path):
    """Rows that they wrote are gone on with. It differs where one of these files or an option differs."""
    for name in ("adapter_model.safetensors", "calibration.json", "schema.json"):
        (tmp_path / name).write_text("{}")
    given = {"adapter": str(tmp_path), "schema": str(tmp_path / "schema.json")}
    plain, held = ({**given, "constrain": constrain} for constrain in (False, True))

    def digest(values: dict[str, object]) -> str:
        return reading_digest(TrainConfig.from_values(values))

    assert (digest(plain), digest(held)) == ("165dcf0a3870", "8912090acba2")
    assert digest({**plain, "prompt": "read."}) != digest(plain) == digest({**plain, "r": 9, "eval_batch_size": 1})
    before = [digest(plain), digest(held)]
    for name, matters in (
        ("schema.json", [False, True]),
        ("calibration.json", [True, True]),
        ("adapter_model.safetensors", [True, True]),
    ):
        (tmp_path / name).write_text("[]")
        after = [digest(plain), digest(held)]
        assert [one != other for one, other in zip(before, after)] == matters
        before = after
