"""The leaderboard ranks the settings, judges each axis, and scores the test split once."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from sweeps import board_of, clear_error, plan, write_run

import im2json
from im2json.files import append_lines
from im2json.runs import RunFolder
from im2json.sweeps.answer import answer, score_test, write_board
from im2json.sweeps.grid import read_plan
from im2json.sweeps.halving import Dropped
from im2json.sweeps.jobs import PointJob, make_jobs
from im2json.sweeps.leaderboard import WinnerScores, make_board, markdown
from im2json.sweeps.processes import Output


def test_settings_are_ranked_and_each_axis_is_judged(tmp_path):
    found = plan(base={"r": 8}, ablate={"r": [8, 16, 32], "dropout": [0, 0.1], "lr": [5e-3, 1e-3]})
    base, one_less = [True] * 30 + [False] * 10, [True] * 29 + [False] * 11
    board = board_of(
        tmp_path, found, {"base": base, "r=16": [True] * 40, "r=32": [False] * 40, "dropout=0.1": one_less}
    )
    assert [setting.name for setting in board.settings] == ["r=16", "base", "dropout=0.1", "r=32"]
    r, dropout, lr = board.axes
    assert (r.best, r.runner_up, r.difference, r.exceeds_noise) == (16, 8, 0.25, True)
    assert 0 < r.low < 0.25 < r.high
    assert r.sentence.startswith("r: 16 is best with field_f1 1.000, before 8 with 0.750: the difference +0.250 [")
    assert (dropout.best, dropout.runner_up, dropout.exceeds_noise) == (0, 0.1, False)
    assert "is within the noise" in dropout.sentence
    assert lr.exceeds_noise is None and "fewer than two" in lr.sentence
    assert board.missing == ["lr=0.001"]

    write_board(board, tmp_path, None)
    shown = (tmp_path / "leaderboard.md").read_text().splitlines()
    assert shown[2].startswith("| **r=16** | 16 | 32 | 0 | 0.005 | 9 | **1.000** [1.000, 1.000] |")
    assert shown[2].endswith("| 1:01 | 1.00 GiB |") and shown[3].startswith(
        "| base | 8 | 16 | 0 | 0.005 | 9 | 0.750 [0."
    )
    with (tmp_path / "leaderboard.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["rank"], row["config"], float(row["field_f1"])) for row in rows[:2]] == [
        ("1", "r=16", 1),
        ("2", "base", 0.75),
    ]
    assert json.loads((tmp_path / "summary.json").read_text())["axes"] == list(map(asdict, board.axes))


@pytest.mark.parametrize(("examples", "exceeds"), [(4, None), (5, True)])
def test_an_axis_is_not_judged_by_a_handful_of_examples(tmp_path, examples, exceeds):
    found = plan(grid={"r": [8, 16]})
    board = board_of(tmp_path, found, {"r=8": [False] * examples, "r=16": [True] * examples})
    (r,) = board.axes
    assert (r.best, r.difference, r.exceeds_noise) == (16, 1, exceeds)
    assert (r.low is None) == (exceeds is None)
    assert r.sentence.endswith("too few to tell this from noise.") == (exceeds is None)


def test_a_metric_where_lower_is_better_ranks_the_other_way_round(tmp_path):
    found = plan(base={"metric": "edit_distance"}, grid={"r": [8, 16]})
    board = board_of(tmp_path, found, {"r=8": [True, False], "r=16": [True, True]})
    assert [setting.name for setting in board.settings] == ["r=16", "r=8"]
    assert board.axes[0].best == 16 and board.axes[0].difference < 0


def test_axes_that_cross_are_judged_around_the_winner(tmp_path):
    found = plan(grid={"r": [8, 16], "dropout": [0, 0.1]})
    rights = {"r=8 dropout=0": 10, "r=8 dropout=0.1": 38, "r=16 dropout=0": 20, "r=16 dropout=0.1": 40}
    board = board_of(tmp_path, found, {name: [i < n for i in range(40)] for name, n in rights.items()})
    assert [(axis.best, axis.runner_up) for axis in board.axes] == [(16, 8), (0.1, 0)]
    assert [axis.difference for axis in board.axes] == pytest.approx([0.05, 0.5])


def test_with_seeds_a_difference_has_to_exceed_theirs_too(tmp_path):
    found = plan(grid={"r": [8, 16]}, seeds=[0, 1])
    right = {"r=8 seed=0": 20, "r=8 seed=1": 36, "r=16 seed=0": 35, "r=16 seed=1": 40}
    board = board_of(tmp_path / "a", found, {name: [i < n for i in range(40)] for name, n in right.items()})
    best = board.settings[0]
    assert (best.name, best.value("field_f1"), best.values("field_f1")) == ("r=16", 37.5 / 40, [35 / 40, 1])
    assert best.best_run("field_f1").path.name == found.points[3].id
    assert board.axes[0].low > 0 and not board.axes[0].exceeds_noise  # 36 of 40 is more than 35
    assert "(0.875 to 1.000)" in markdown(board)
    right["r=8 seed=1"] = 21
    board = board_of(tmp_path / "b", found, {name: [i < n for i in range(40)] for name, n in right.items()})
    assert board.axes[0].exceeds_noise
    del right["r=8 seed=1"]
    board = board_of(tmp_path / "c", found, {name: [i < n for i in range(40)] for name, n in right.items()})
    assert board.axes[0].exceeds_noise is None and "not validated on the same" in board.axes[0].sentence


def test_the_leaderboard_names_what_was_dropped_with_its_metric(tmp_path):
    found = plan(grid={"r": [8, 16]})
    write_run(tmp_path / "points" / found.points[0].id, [True])
    dropped = [Dropped("r=16", 2, "edit_distance", 0.25)]
    board = make_board(found, make_jobs(found.points, tmp_path), dropped)
    assert "Dropped by halving: r=16 after step 2 (edit_distance 0.250)." in markdown(board)
    write_board(board, tmp_path, None)
    assert json.loads((tmp_path / "summary.json").read_text())["dropped"] == [
        {"setting": "r=16", "step": 2, "metric": "edit_distance", "value": 0.25}
    ]


def test_the_test_split_is_scored_once_and_shown_as_long_as_the_winner_stays(tmp_path):
    found = plan(grid={"r": [8, 16]})
    board_of(tmp_path, found, {"r=8": [True, False]})
    scored = []

    def score(winner, log):
        scored.append(winner.path.name)
        return Output(0, '{"before": {"field_f1": 0.0}, "after": {"field_f1": 0.5}, "confidence": {"threshold": null}}')

    def stored() -> Any:
        return json.loads((tmp_path / "summary.json").read_text())["test"]

    answer(found, make_jobs(found.points, tmp_path), tmp_path, [], score)
    answer(found, make_jobs(found.points, tmp_path), tmp_path, [])  # as after Ctrl-C
    assert stored()["point"] == found.points[0].id == scored[0]
    assert stored() == json.loads((tmp_path / "test.json").read_text())
    assert list(stored()) == ["point", "before", "after", "confidence"]
    assert "Test split" in (tmp_path / "report.html").read_text()
    board_of(tmp_path, found, {"r=16": [True, True]})
    answer(found, make_jobs(found.points, tmp_path), tmp_path, [])
    assert stored() is None and len(scored) == 1


def test_two_sweeps_at_their_end_score_the_test_split_once(tmp_path):
    found = plan(grid={"r": [8]})
    board_of(tmp_path, found, {"r=8": [True]})
    scored = []

    def score(winner, log):
        scored.append(winner.path.name)
        time.sleep(0.5)
        return Output(0, '{"before": {"field_f1": 0.0}, "after": {"field_f1": 1.0}}')

    run = RunFolder(tmp_path / "points" / found.points[0].id)
    with ThreadPoolExecutor() as both:
        first, second = both.map(lambda _: score_test(run, tmp_path, score), range(2))
    assert first == second and len(scored) == 1


class AtOnce:
    """A backend whose points, none of which is to pause, end as soon as they are started. Those in `answers` are done
    then, the others fail."""

    def __init__(self, answers: dict[str, list[bool]], score: Output, said: str = "") -> None:
        self.answers = answers
        self.score = score
        self.said = said  # on stderr, while it scores
        self.started: list[str] = []
        self.scored: list[list[str]] = []

    def has_capacity(self, running: list[PointJob]) -> bool:
        return True

    def start(self, job: PointJob, running: list[PointJob]) -> bool:
        assert job.stop_after is None
        self.started.append(job.point.name)
        job.log.write_text("Error: on purpose\n")
        if job.point.name in self.answers:
            write_run(job.run.path, self.answers[job.point.name])
        return True

    def is_running(self, job: PointJob) -> bool:
        return False

    def run_python(self, arguments: list[str], log: Path) -> Output:
        self.scored.append(arguments)
        log.write_text(self.said)
        return self.score


def test_a_sweep_runs_what_is_not_done_and_says_what_failed(cli, tmp_path, monkeypatch):
    monkeypatch.setattr("im2json.sweeps.scheduler.POLL_SECONDS", 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    grid, sweep, points = tmp_path / "g.json", tmp_path / "sweep", tmp_path / "sweep" / "points"
    grid.write_text('{"grid": {"r": [8, 16]}}')
    first, second = (str(points / point.id) for point in read_plan(grid).points)

    def run(backend: AtOnce) -> Result:
        monkeypatch.setattr("im2json.commands.sweep.Local", lambda *_: backend)
        return cli("sweep", grid, "--output", sweep)

    unscored = AtOnce({"r=8": [True, False]}, Output(1, ""), "Traceback\n  line 1\nError: no memory\n")
    error = clear_error(run(unscored))
    log = sweep / "test.log"
    assert error.startswith(f"the test split of {first} could not be scored: Error: no memory ({log})")
    assert (sweep / "leaderboard.csv").exists()  # written before

    scores = Output(0, '{"before": {"field_f1": 0.0}, "after": {"field_f1": 0.5}}')
    result = run(backend := AtOnce({}, scores))
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "1 of 2 points failed; the same command tries them again"
    assert backend.started == ["r=16"]
    assert backend.scored == [["-m", "im2json", "evaluate", first, "--json"]]
    stored = json.loads((sweep / "summary.json").read_text())
    assert (stored["missing"], stored["test"]["after"]) == (["r=16"], {"field_f1": 0.5})

    result = run(backend := AtOnce({"r=16": [True, True]}, scores))
    assert result.exit_code == 0, result.output
    assert (backend.started, backend.scored[0][3]) == (["r=16"], second)
    assert json.loads((sweep / "summary.json").read_text())["missing"] == []
    result = run(backend := AtOnce({}, scores))
    assert (result.exit_code, backend.started, backend.scored) == (0, [], [])


def test_a_sweep_that_is_stopped_ranks_what_has_finished_and_scores_nothing(cli, tmp_path, monkeypatch):
    class Stopped(AtOnce):
        """One point at a time; during the first comes SIGTERM."""

        def has_capacity(self, running: list[PointJob]) -> bool:
            return not running

        def start(self, job: PointJob, running: list[PointJob]) -> bool:
            signal.raise_signal(signal.SIGTERM)
            return super().start(job, running)

        def stop(self, job: PointJob, at_once: bool) -> None:
            assert not at_once

    monkeypatch.setattr("im2json.sweeps.scheduler.POLL_SECONDS", 0)
    backend = Stopped({"r=8": [True, False]}, Output(0, "{}"))
    monkeypatch.setattr("im2json.commands.sweep.Local", lambda *_: backend)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "g.json").write_text('{"grid": {"r": [8, 16]}}')
    result = cli("sweep", tmp_path / "g.json", "--output", tmp_path / "sweep")
    assert (result.exit_code, backend.started, backend.scored) == (130, ["r=8"], [])
    assert "interrupted: the same command goes on" in result.stderr
    shutil.copytree(tmp_path / "sweep", tmp_path / "again")
    with pytest.raises(KeyboardInterrupt, match=r"what .*again holds is kept; the same call goes on"):
        im2json.sweep(tmp_path / "g.json", output=tmp_path / "again")
    assert backend.started == ["r=8", "r=16"]
    stored = json.loads((tmp_path / "sweep" / "summary.json").read_text())
    assert ([setting["config"] for setting in stored["settings"]], stored["missing"]) == (["r=8"], ["r=16"])


class Page(HTMLParser):
    """The parts of an HTML page: texts, rows of tables, titles of lines in plots, and links."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: list[str] = []
        self.rows: list[list[str]] = []
        self.lines: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        self.texts.append(data)
        if self.tags[-2:] == ["polyline", "title"] and data.strip():
            self.lines.append(data)
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def test_the_page_shows_settings_axes_curves_and_the_test_split(tmp_path):
    found = plan(grid={"prompt": ["<script>a&b", "read"], "r": [32, 8]}, seeds=[0, 1])
    rights = {point.name: [i < 20 + n for i in range(40)] for n, point in enumerate(found.points[:-1])}
    board = board_of(tmp_path, found, rights)
    for setting in board.settings:
        for run in setting.runs:
            losses = [{"step": n, "split": "train", "values": {"loss": 1 / n}} for n in (1, 2)]
            append_lines(run.metrics_file, [*losses, {"step": 2, "split": "validation", "values": {"field_f1": 0.5}}])
    write_board(board, tmp_path, WinnerScores("its-id", {"field_f1": 0.0}, {"field_f1": 0.75}))
    text = (tmp_path / "report.html").read_text("utf-8")
    page = Page(text)
    assert "script" not in page.tags and page.links == [] and "url(" not in text and "//" not in text
    shown = " ".join(page.texts)
    assert f"7 of 8 points have a result, of 4 settings. Without a result: {found.points[-1].name}." in shown
    assert all(axis.sentence in shown for axis in board.axes) and "At r=" in shown
    table = {row[0]: row for row in page.rows}
    for setting in board.settings:
        assert f"{setting.value('field_f1'):.3f}[" in table[setting.name][6]
    assert {"ted_accuracy", "edit_distance (lower is better)", "time"} <= set(table["config"])
    assert [cell.strip() for cell in table["field_f1"]] == ["field_f1", "0.000", "0.750", "+0.750", "better"]
    assert len(page.lines) == 7 and "prompt=<script>a&b r=32 seed=1" in page.lines
    assert shown.index(" 32 ", shown.index("At prompt=")) < shown.index(" 8 ", shown.index("At prompt="))


def test_a_page_of_one_setting_and_of_an_ablation_with_gaps(tmp_path):
    found = plan(base={"steps": 2})
    write_board(board_of(tmp_path / "one", found, {"base": [True]}), tmp_path / "one", None)
    page = Page((tmp_path / "one" / "report.html").read_text("utf-8"))
    assert "1 of 1 points have a result." in " ".join(page.texts) and "Training" not in page.texts
    found = plan(base={"r": 16}, ablate={"r": [8, 16, 32], "dropout": [0.1, 0.2]})
    board = board_of(tmp_path / "gaps", found, {"r=32": [True, False]})
    assert board.order == {"r": [8, 16, 32], "dropout": [0.0, 0.1, 0.2]}
    write_board(board, tmp_path / "gaps", None)
    texts = Page((tmp_path / "gaps" / "report.html").read_text("utf-8")).texts
    assert "dropout: fewer than two of its values have a result." in texts
    assert texts.index("8") < texts.index("16", texts.index("8"))
