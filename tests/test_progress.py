"""Progress in a file: a few lines, where a terminal has a bar."""

from __future__ import annotations

import im2json.progress
from im2json.progress import progress_bar


def lines(capsys):
    return capsys.readouterr().err.splitlines()


def test_in_a_file_a_bar_is_a_line_at_both_ends(capsys):
    with progress_bar(300, "training", "step", done=100) as bar:
        for _ in range(200):
            bar.set_postfix({"loss": "0.5"}, refresh=False)
            bar.update()
    first, last = lines(capsys)
    assert first.startswith("training: 100/300 [")
    assert last.startswith("training: 300/300 [")
    assert last.endswith("loss=0.5]")


def test_a_line_comes_every_so_many_seconds(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(im2json.progress.time, "monotonic", lambda: now[0])
    with progress_bar(10, "validation", "ex", keep=False) as bar:
        for _ in range(10):
            now[0] += 20
            bar.update()
    assert [line.split(" [")[0] for line in lines(capsys)] == [f"validation: {n}/10" for n in (2, 4, 6, 8, 10)]


def test_short_work_that_is_not_kept_and_other_processes_leave_no_line(capsys):
    with progress_bar(10, "validation", "ex", keep=False) as bar:
        bar.update(10)
    with progress_bar(10, "training", "step", shown=False) as bar:
        bar.update(10)
    assert lines(capsys) == []


def test_work_that_stops_says_how_far_it_came(capsys):
    try:
        with progress_bar(10, "extract", "pic") as bar:
            bar.update(3)
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert lines(capsys)[-1].startswith("extract: 3/10 [")
