"""evaluate.py without a model: predictions made anywhere, and two runs side by side."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import COUNTS, ROOT, clear_error

from im2json.report.comparison import comparison_report, scorecard_report, verdict
from im2json.runs import RunFolder
from im2json.scoring import METRICS, Difference, StreamingEvaluator
from im2json.scoring.errors import ERRORS
from im2json.scoring.fieldtable import MAX_FOREIGN
from im2json.scoring.scorecard import Scorecard

TARGET = {"menu": [{"nm": "茶", "price": "5.00"}, {"nm": "pie"}], "total": "9"}
ROWS = [
    {"id": "a", "prediction": json.dumps(TARGET), "target": TARGET},
    {"id": 2, "prediction": {"menu": {"nm": "pie"}, "total": "8"}, "target": TARGET},
    {"id": "c", "text": "nothing", "target": json.dumps(TARGET)},
    {"id": "d", "prediction": None, "target": TARGET},
]


def write(path: Path, rows: list[Any]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def wanted(rows: list[dict[str, Any]]) -> StreamingEvaluator:
    evaluator = StreamingEvaluator()
    for row in rows:
        text = row.get("prediction", row.get("text"))
        text = text if isinstance(text, str) else json.dumps(text)
        target = row["target"] if isinstance(row["target"], dict) else json.loads(row["target"])
        evaluator.update(text, target, str(row["id"]))
    return evaluator


def errors_of(result: Any) -> list[str]:
    return [line.removeprefix("Error: ") for line in result.stderr.splitlines()]


def test_rows_with_targets(cli, tmp_path):
    result = cli("evaluate", "--predictions", write(tmp_path / "p.jsonl", ROWS), "--json")
    assert result.exit_code == 0, result.output
    found, evaluator = json.loads(result.stdout), wanted(ROWS)
    assert found.keys() == {"num", "metrics", "fields", "errors"}
    assert found["num"] == 4
    values, bounds = evaluator.compute(), evaluator.intervals()
    assert list(found["metrics"]) == list(METRICS)
    for name, metric in found["metrics"].items():
        low, high = bounds[name] or (None, None)
        assert metric == pytest.approx({"value": values[name], "low": low, "high": high}, abs=1e-12)
    (name,) = (row for row in found["fields"] if row["path"] == "menu.nm")
    assert (name["support"], name["predicted"], name["recall"], name["precision"]) == (8, 3, 3 / 8, 1.0)
    assert list(found["errors"]) == list(ERRORS)
    assert found["errors"]["invalid_json"] == {"examples": 2, "occurrences": 2}
    assert found["errors"]["digit_slip"] == {"examples": 1, "occurrences": 1}


def test_two_files_are_joined_by_id_in_any_order(cli, tmp_path):
    together = cli("evaluate", "--predictions", write(tmp_path / "both.jsonl", ROWS), "--json")
    predictions = [{key: value for key, value in row.items() if key != "target"} for row in ROWS]
    targets = [{"id": str(row["id"]), "target": row["target"]} for row in ROWS[::-1]]
    files = write(tmp_path / "p.jsonl", predictions), write(tmp_path / "t.jsonl", ["", *targets])
    apart = cli("evaluate", "--predictions", files[0], "--targets", files[1], "--json")
    assert apart.exit_code == 0, apart.output
    assert json.loads(apart.stdout) == json.loads(together.stdout)


def test_tables(cli, tmp_path):
    printed = cli("evaluate", "--predictions", write(tmp_path / "p.jsonl", ROWS)).stdout
    lines = [line.split() for line in printed.splitlines()]
    value = wanted(ROWS).compute()["field_f1"]
    assert ["field_f1", f"{value:.3f}", "-", "-"] in lines
    assert ["field", "support", "predicted", "precision", "recall", "F1", "similarity"] in lines
    assert ["total", "4", "2", "0.500", "0.250", "0.333", "0.250"] in lines
    assert ["invalid_json", "2", "2"] in lines
    assert "4 examples, too few for intervals" in printed
    more = [{**row, "id": f"{row['id']} again"} for row in ROWS] + ROWS
    printed = cli("evaluate", "--predictions", write(tmp_path / "more.jsonl", more)).stdout
    low, high = wanted(more).intervals()["field_f1"]
    assert ["field_f1", f"{value:.3f}", f"{low:.3f}", f"{high:.3f}"] in map(str.split, printed.splitlines())
    assert "8 examples, with 95 % intervals" in printed


BAD = {
    '{"id": "x", ': "is not JSON",
    '["a"]': "a row is a JSON object",
    '{"id": "x", "target": {}}': "neither prediction nor text",
    '{"id": "x", "prediction": 3, "target": {}}': "a prediction is a text, an object or null",
    '{"id": "x", "prediction": "{}"}': "no target",
    '{"id": "x", "prediction": "{}", "target": [1]}': "a target is a JSON object",
    '{"id": "x", "prediction": "{}", "target": ' + '{"a":' * 200 + "1" + "}" * 201: "a target is a JSON object",
    '{"id": 1.5, "prediction": "{}", "target": {}}': "an id is a text or a whole number",
    '{"id": "a", "prediction": "{}", "target": {}}': "id 'a' comes twice",
    "[" * 100_000: "is not JSON",
}


@pytest.mark.parametrize("line", BAD, ids=list(BAD.values()))
def test_a_bad_row_is_named_and_nothing_else_is_lost(cli, tmp_path, line):
    path = write(tmp_path / "p.jsonl", [ROWS[0], line, *ROWS[1:]])
    result = cli("evaluate", "--predictions", path, "--json")
    assert result.exit_code == 1
    (error,) = errors_of(result)
    assert error.startswith(f"{path}:2: {BAD[line]}")
    whole = cli("evaluate", "--predictions", write(path, ROWS), "--json")
    assert json.loads(result.stdout) == json.loads(whole.stdout)


@pytest.mark.parametrize("wrapped", [
    {"gt_parse": {"menu": {"nm": "Tea"}}, "meta": 1},
    {"gt_parses": [{"menu": {"nm": "Tea"}}, {"menu": {"nm": "Te"}}]},
])  # fmt: skip
def test_targets_are_unwrapped_as_in_training(cli, tmp_path, wrapped):
    predictions = write(tmp_path / "p.jsonl", [{"id": i, "prediction": {"menu": {"nm": "Tea"}}} for i in range(2)])
    targets = write(tmp_path / "t.jsonl", [{"id": 0, "target": wrapped}, {"id": 1, "target": json.dumps(wrapped)}])
    result = cli("evaluate", "--predictions", predictions, "--targets", targets, "--json")
    assert json.loads(result.stdout)["metrics"]["exact_match"]["value"] == 1.0
    inside = write(tmp_path / "q.jsonl", [{"prediction": {"menu": {"nm": "Tea"}}, "target": wrapped}])
    assert json.loads(cli("evaluate", "--predictions", inside, "--json").stdout)["metrics"]["field_f1"]["value"] == 1.0


def test_bytes_that_are_no_text(cli, tmp_path):
    path = write(tmp_path / "p.jsonl", ROWS)
    path.write_bytes(b'\xff{"id": 1}\n' + path.read_bytes())
    result = cli("evaluate", "--predictions", path, "--json")
    assert errors_of(result) == [f"{path}:1: is not UTF-8 text (byte 0)"]
    assert json.loads(result.stdout)["num"] == 4


def test_ids_that_do_not_join(cli, tmp_path):
    predictions = write(tmp_path / "p.jsonl", [
        {"id": "a", "text": "{}"}, {"id": "b", "text": "{}"}, {"id": "a", "text": "{}"}, {"text": "{}"},
    ])  # fmt: skip
    targets = write(tmp_path / "t.jsonl", [
        {"id": "a", "target": {}}, {"id": "c", "target": {}}, {"id": "a", "target": {"a": 1}}, {"target": {}},
    ])  # fmt: skip
    result = cli("evaluate", "--predictions", predictions, "--targets", targets, "--json")
    assert result.exit_code == 1
    assert errors_of(result) == [
        f"{targets}:3: id 'a' comes twice, first in line 1",
        f"{targets}:4: no id to join it by",
        f"{predictions}:2: {targets} has no target for id 'b'",
        f"{predictions}:3: id 'a' comes twice",
        f"{predictions}:4: no id to join it by",
        f"{predictions}: no prediction for id 'c' of {targets}",
    ]
    assert json.loads(result.stdout)["num"] == 1


def test_many_bad_rows_are_counted(cli, tmp_path):
    result = cli("evaluate", "--predictions", write(tmp_path / "p.jsonl", ["{"] * 50 + ROWS))
    assert len(errors_of(result)) == 21
    assert errors_of(result)[-1] == "and 30 more such rows"
    assert "4 examples" in result.stdout


def test_nothing_to_score(cli, tmp_path):
    path = write(tmp_path / "p.jsonl", [""])
    assert clear_error(cli("evaluate", "--predictions", path)) == f"{path} holds no example that can be scored"


@pytest.mark.parametrize(
    "flags", [[], ["run", "--predictions", __file__], ["--against", "b"], ["run", "--targets", __file__],
              ["--predictions", __file__, "--against", "b"], ["--predictions", "nowhere.jsonl"]]
)  # fmt: skip
def test_flags_that_do_not_go_together(cli, flags):
    result = cli("evaluate", *flags)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr and "Traceback" not in result.output


def test_no_torch_is_imported(tmp_path):
    path = write(tmp_path / "p.jsonl", ROWS)
    code = (
        "import runpy, sys, atexit\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets'}\n"
        "atexit.register(lambda: print(sorted(heavy & sys.modules.keys())))\n"
        f"sys.argv = ['evaluate.py', '--predictions', {str(path)!r}]\n"
        "runpy.run_path('evaluate.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "field_f1" in done.stdout


# --- runs


def kept(folder: Path, texts: list[str], targets: list[dict[str, Any]]) -> RunFolder:
    """A run's folder as far as its predictions go, other stages and splits among them."""
    folder.mkdir()
    rows: list[Any] = []
    for i, (text, target) in enumerate(zip(texts, targets)):
        row = {"step": 4, "split": "test", "stage": "after", "id": str(i), "text": text, "target": target}
        rows += [{**row, "stage": "before", "text": "?"}, {**row, "split": "validation", "stage": "during"}, row]
    write(folder / "predictions.jsonl", rows)
    return RunFolder(folder)


@pytest.fixture
def runs(tmp_path: Path) -> tuple[RunFolder, RunFolder]:
    """Two runs on the same 80 examples: B reads nm more often and price less often than A."""
    rng = random.Random(3)
    targets = [{"nm": f"item {i}", "price": str(i), "cnt": "1"} for i in range(80)]

    def texts(nm: float, price: float) -> list[str]:
        shares = {"nm": nm, "price": price, "cnt": 1.0}
        return [json.dumps({k: v if rng.random() < shares[k] else "?" for k, v in t.items()}) for t in targets]

    return kept(tmp_path / "A", texts(0.3, 0.9), targets), kept(tmp_path / "B", texts(0.9, 0.6), targets)


def test_against_says_what_got_better(cli, runs):
    a, b = runs
    result = cli("evaluate", a.path, "--against", b.path, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert list(found["metrics"]) == list(METRICS)
    assert {path: field["verdict"] for path, field in found["fields"].items()} == {
        "cnt": "within noise", "nm": "better", "price": "worse",
    }  # fmt: skip
    field_f1 = found["metrics"]["field_f1"]
    assert field_f1["verdict"] == "better"
    assert field_f1["low"] < field_f1["difference"] < field_f1["high"]
    assert found["metrics"]["edit_distance"]["verdict"] == "better"
    assert found["metrics"]["json_validity"]["verdict"] == "within noise"
    back = json.loads(cli("evaluate", b.path, "--against", a.path, "--json").stdout)
    assert back["metrics"]["field_f1"]["verdict"] == "worse"
    assert back["metrics"]["field_f1"]["low"] == pytest.approx(-field_f1["high"])


def test_compare_and_score_are_commands_of_their_own(cli, runs):
    a, b = runs
    compared = cli("im2json.app", "compare", a.path, b.path, "--json")
    assert compared.exit_code == 0
    assert compared.stdout == cli("evaluate", a.path, "--against", b.path, "--json").stdout
    scored = cli("im2json.app", "score", a.predictions_file)
    assert scored.exit_code == 0
    assert scored.stdout == cli("evaluate", "--predictions", a.predictions_file).stdout


def test_against_prints_tables(cli, runs):
    a, b = runs
    result = cli("evaluate", a.path, "--against", b.path)
    lines = result.stdout.splitlines()
    assert lines[0] == "test split, 80 examples"
    (price,) = (line for line in lines if line.startswith("price "))
    assert price.split()[-1] == "worse" and price.split()[3].startswith("-")
    assert sum(line.endswith("within noise") for line in lines) >= 2


def test_against_itself_nothing_differs(runs):
    assert "better" not in comparison_report(runs[0], runs[0], "test").replace("lower is better", "")


def test_against_needs_the_same_examples(cli, runs, tmp_path):
    a, b = runs
    fewer = RunFolder(tmp_path / "fewer")
    fewer.path.mkdir()
    fewer.predictions_file.write_text("".join(b.predictions_file.read_text().splitlines(keepends=True)[:30]))
    assert "70 examples are not the same" in clear_error(cli("evaluate", a.path, "--against", fewer.path))
    empty = clear_error(cli("evaluate", a.path, "--against", tmp_path / "nowhere"))
    assert empty == f"{tmp_path / 'nowhere'}: there is no such run folder"
    (tmp_path / "nowhere").mkdir()
    (tmp_path / "nowhere" / "config.json").touch()
    empty = clear_error(cli("evaluate", a.path, "--against", tmp_path / "nowhere"))
    assert "holds no predictions of the test split after training: `im2json evaluate" in empty


def test_a_runs_own_predictions_file(cli, runs):
    found = json.loads(cli("evaluate", "--predictions", runs[0].predictions_file, "--json").stdout)
    assert found["num"] == 80
    assert found["errors"]["invalid_json"]["examples"] == 0  # those of before are left out


def test_a_few_examples_decide_nothing(cli, tmp_path):
    targets = [{"a": "1"}] * 3
    runs = kept(tmp_path / "A", ['{"a":"x"}'] * 3, targets), kept(tmp_path / "B", ['{"a":"1"}'] * 3, targets)
    found = json.loads(cli("evaluate", runs[0].path, "--against", runs[1].path, "--json").stdout)
    for difference in (found["fields"]["a"], *found["metrics"].values()):
        assert difference["verdict"] == "too few"
        assert difference["low"] is None
    assert found["metrics"]["exact_match"]["difference"] == 1


def test_verdicts_know_which_way_is_better():
    assert verdict(Difference(0.5, 0.4, -0.1, -0.2, -0.05), higher_is_better=False) == "better"
    assert verdict(Difference(0.5, 0.4, -0.1, -0.2, -0.05), higher_is_better=True) == "worse"
    assert verdict(Difference(0.5, 0.4, -0.1, -0.2, 0.05), higher_is_better=True) == "within noise"


def test_a_run_is_shown_in_detail(cli, finished, tmp_path):
    run = RunFolder(Path(shutil.copytree(finished.path, tmp_path / "run")))
    printed = cli("evaluate", run.path).stdout
    assert f"after, in detail: {COUNTS['test']} examples, too few for intervals:" in printed
    detail = next(
        line for line in printed.split("after, in detail")[1].splitlines() if line.startswith("edit_distance")
    )
    value, low, high = detail.split()[-3:]
    wanted = json.loads(run.result.read_text())["test"]["after"]["edit_distance"]
    assert float(value) == pytest.approx(wanted, abs=5e-4) and low == high == "-"


def test_paths_that_no_target_has_are_shown_in_part():
    card = Scorecard()
    for i in range(300):
        card.update(json.dumps({f"k{i:03}": "x", "oft": "x"}), {"a": "1"})
    printed = scorecard_report(card)
    assert f"... and {MAX_FOREIGN - 10} more that no target has" in printed
    assert "oft" in printed and "(other)" in printed
    assert len(card.as_json()["fields"]) == 1 + MAX_FOREIGN + 1
