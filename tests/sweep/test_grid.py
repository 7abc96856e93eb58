"""Grids are checked before anything starts, and their points are the same in any grid."""

from __future__ import annotations

from typing import Any

import pytest
from sweeps import ROOT, board_of, clear_error, plan

from im2json.options import OPTIONS, TrainConfig
from im2json.sweeps.grid import read_plan
from im2json.sweeps.leaderboard import markdown


def options(points: list, *names: str) -> list[tuple]:
    return [tuple(point.config.flat()[name] for name in names) for point in points]


def test_a_grid_crosses_its_axes():
    points = plan(base={"steps": 5}, grid={"r": [8, 16], "lr": [1e-3, 2e-3]}).points
    assert options(points, "r", "lr", "alpha", "steps") == [
        (8, 1e-3, 16, 5), (8, 2e-3, 16, 5), (16, 1e-3, 32, 5), (16, 2e-3, 32, 5),
    ]  # fmt: skip
    assert [point.name for point in points[:2]] == ["r=8 lr=0.001", "r=8 lr=0.002"]


def test_an_ablation_varies_one_axis_at_a_time_around_its_base():
    found = plan(base={"r": 32}, ablate={"r": [8, 32], "alpha": ["r", "2r"], "dropout": [0, 0.05]})
    assert options(found.points, "r", "alpha", "dropout") == [(32, 64, 0), (8, 16, 0), (32, 32, 0), (32, 64, 0.05)]
    assert [point.name for point in found.points] == ["base", "r=8", "alpha=r", "dropout=0.05"]
    assert found.base == {"r": 32, "alpha": "2r", "dropout": 0}
    assert found.points[1].axis_values == {"r": 8, "alpha": "2r", "dropout": 0}


def test_an_alpha_that_follows_r_is_shown_as_a_multiple_of_r():
    """The point r=8 has alpha 16, so a value of 64 would be wrong for it."""
    for base in ({"r": 32}, {"r": 32, "alpha": "2r"}):
        found = plan(base=base, ablate={"alpha": [16, 64, 5], "r": [8]})
        assert options(found.points, "r", "alpha") == [(32, 64), (32, 16), (32, 5), (8, 16)]
        assert found.base == {"alpha": "2r", "r": 32} and found.points[-1].axis_values == {"alpha": "2r", "r": 8}
        assert found.axes == {"alpha": ["2r", 16, 5], "r": [32, 8]}
    assert plan(base={"r": 32}, ablate={"alpha": [16, 64]}).axes == {"alpha": [16, 64]}
    found = plan(base={"r": 32, "alpha": 64}, ablate={"alpha": [16, 64], "r": [8]})
    assert found.points[-1].axis_values == {"alpha": 64, "r": 8} and options(found.points[-1:], "alpha") == [(64,)]


def test_a_line_break_in_a_value_is_shown_escaped(tmp_path):
    found = plan(grid={"prompt": ["read\nit", "read it"]})
    assert [point.name for point in found.points] == [r"prompt='read\nit'", "prompt=read it"]
    written = markdown(board_of(tmp_path, found, {r"prompt='read\nit'": [True], "prompt=read it": [False]}))
    assert [line[:3] for line in written.splitlines()[2:5]] == ["| *", "| p", ""]
    assert r"- prompt: 'read\nit' is best" in written


def test_seeds_repeat_every_point():
    points = plan(grid={"r": [8, 16]}, seeds=[0, 1]).points
    assert options(points, "r", "seed") == [(8, 0), (8, 1), (16, 0), (16, 1)]
    assert [point.setting for point in points] == ["r=8", "r=8", "r=16", "r=16"]


@pytest.mark.parametrize(
    ("alpha", "r", "wanted"), [("2r", 8, 16), ("r", 8, 8), ("0.5r", 8, 4), (5, 8, 5), ("3r", 16, 48)]
)
def test_alpha_may_depend_on_r(alpha, r, wanted):
    assert options(plan(base={"alpha": alpha}, grid={"r": [r]}).points, "alpha") == [(wanted,)]
    assert options(plan(base={"r": r}, grid={"alpha": [alpha]}).points, "alpha") == [(wanted,)]


def test_alpha_follows_the_r_of_a_preset():
    assert options(plan(preset="cord", base={"alpha": "r"}).points, "r", "alpha", "lr") == [(32, 32, 2e-4)]


def test_an_id_says_what_decides_the_result_and_nothing_else():
    def ids(*rs: int, **base: Any) -> list[str]:
        return [point.id for point in plan(base=base, grid={"r": list(rs)}).points]

    assert ids(8, 16) == ids(8, 12, 16)[::2] == ids(8, 16, threads=1, workers=2, keep=5, lr=5e-3)
    assert not set(ids(8, 16)) & set(ids(8, 16, steps=7))
    (alone,) = plan(base={"r": 8, "alpha": "2r"}).points
    assert alone.id == ids(8)[0] == plan(ablate={"r": [16]}, base={"r": 8}).points[0].id


@pytest.mark.parametrize("microbatch", [2, "auto"])
@pytest.mark.parametrize("preset", [None, "tiny", "cord"])
def test_the_flags_of_a_point_make_its_config(preset, microbatch, monkeypatch):
    import train

    base = {"model": "somewhere", "rslora": True, "gradient_checkpointing": "off", "alpha": "2r", "prompt": "read it"}
    base["microbatch"] = microbatch
    (point,) = plan(preset=preset, base={**base, "r": 32, "lr": 1.23456789e-4}).points
    configs: list[TrainConfig] = []
    monkeypatch.setattr("im2json.commands.train.train", lambda config, *more: (configs.append(config), config))
    train.main(point.flags, standalone_mode=False)
    assert configs == [point.config]
    assert configs[0].train.test is False


def test_set_overrides_the_base(tmp_path):
    grid = tmp_path / "g.json"
    grid.write_text('{"base": {"steps": 300}, "grid": {"r": [8]}}')
    (point,) = read_plan(grid, ["steps=50", "dataset=17", "alpha=3r", "letterbox=true", "microbatch=auto"]).points
    flat = point.config.flat()
    names = ("steps", "dataset", "alpha", "letterbox", "microbatch")
    assert [flat[name] for name in names] == [50, "17", 24.0, True, "auto"]


def test_a_point_resolves_its_options_three_times_at_most(monkeypatch):
    """For its config, for its flags, and for an alpha that follows r."""
    calls = []
    resolve = TrainConfig.resolve
    monkeypatch.setattr(TrainConfig, "resolve", lambda *given: calls.append(given) or resolve(*given))
    found = plan(grid={"r": list(range(1, 26)), "alpha": ["r", "2r"], "dropout": [0, 0.1]}, seeds=[0, 1]).points
    assert len({point.id for point in found}) == 200
    assert len(calls) <= 3 * 200


MISTAKES = {
    '{"base": {"rr": 8}}': "base.rr: unknown option 'rr': did you mean 'r'?",
    '{"grid": {"r": [8, "x"]}}': "grid.r: 'x' is not a whole number",
    '{"ablate": {"dropout": [0, 1.5]}}': "ablate.dropout: 1.5 is too large: at most 0.999",
    '{"grid": {"lr": [1e-3, NaN]}}': "NaN is not JSON",
    '{"grid": {"r": []}}': "grid.r: expected a list of values, like [8, 16, 32], not []",
    '{"grid": {"r": 8}}': "grid.r: expected a list of values, like [8, 16, 32], not 8",
    '{"grid": {"r": [8, 16, 8]}}': "grid.r: 8 comes twice",
    '{"grid": {"r": [8], "alpha": ["2r", 16]}}': "r=8 alpha=2r and r=8 alpha=16 are the same point: leave one out",
    '{"base": {"r": 8}, "ablate": {"alpha": ["2r", 16]}}': "ablate.alpha: '2r' and 16 are the same point",
    '{"grid": {"alpha": ["two r"]}}': "grid.alpha: 'two r' is neither a number nor a multiple of r, like \"2r\"",
    '{"grid": {"alpha": ["٣r"]}}': "grid.alpha: '٣r' is neither a number nor a multiple of r, like \"2r\"",
    '{"base": {"alpha": "0r"}}': "base.alpha: 0.0 is too small: more than 0",
    '{"grid": {"alpha": ["%sr"]}}' % ("9" * 400): "grid.alpha: inf is not a finite number",
    '{"grid": {"lr": [1%s]}}' % ("0" * 400): "grid.lr: a whole number of more than 300 digits is too large",
    '{"base": {"steps": 1%s}}' % ("0" * 400): "base.steps: a whole number of more than 300 digits is too large",
    '{"grid": {"prompt": ["a\\u0000b"]}}': r"grid.prompt: 'a\x00b' holds a character that no command line can",
    '{"base": {"dataset": "a\\ud800"}}': r"base.dataset: 'a\ud800' holds a character that no command line can",
    '{"grid": {"threads": [1, 2]}}': "grid.threads: it does not change the result; it belongs into base",
    '{"grid": {"metric": ["key_f1"]}}': "grid.metric: points are ranked by one metric; it belongs into base",
    '{"base": {"output": "there"}}': "base.output: leave it out, a sweep names the run folders itself",
    '{"base": {"test": true}}': "base.test: leave it out, a sweep scores the test split once, for the winner",
    '{"base": {"eval_every": 0}}': "eval_every: 0 leaves nothing to rank the points by: at least 1",
    '{"base": {"r": 8}, "grid": {"r": [8]}}': "r is in base (or --set) and an axis of grid: leave one out",
    '{"base": {"seed": 1}, "seeds": [1]}': "base.seed and seeds: leave one out",
    '{"grid": {}, "ablate": {}}': "grid and ablate: give one of the two",
    '{"seeds": [0, -1]}': "seeds: -1 is too small: at least 0",
    '{"preset": "cord2"}': "preset: 'cord2' is not one of tiny, cord",
    '{"preset": ["cord"]}': "preset: ['cord'] is not one of tiny, cord",
    '{"r": [8]}': "unknown key 'r': a grid holds preset, base, grid, ablate, seeds; options go into base",
    '{"grid": {"r": [8], "r": [16]}}': "the key 'r' stands twice in one object",
    "[8]": "a grid is a JSON object",
    '{"base":\n {"r": 8,}}': "is not JSON: ",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_is_one_line_before_anything_starts(text, cli, tmp_path):
    grid = tmp_path / "g.json"
    grid.write_text(text)
    message = clear_error(cli("sweep", grid, "--output", tmp_path / "sweep"))
    assert message.startswith(str(grid)) and MISTAKES[text] in message
    assert not (tmp_path / "sweep").exists()


def test_a_mistake_in_set_is_one_line_too(cli, tmp_path):
    (tmp_path / "g.json").write_text('{"grid": {"r": [8]}}')
    for given, message in {
        "steps": "--set steps: expected NAME=VALUE, like steps=50",
        "steps=many": "--set steps: 'many' is not a whole number",
        "output=there": "--set output: leave it out, a sweep names the run folders itself",
        "r=9": "r is in base (or --set) and an axis of grid: leave one out",
    }.items():
        assert clear_error(cli("sweep", tmp_path / "g.json", "--set", given)).endswith(message)


def test_the_line_of_malformed_json_is_named(cli, tmp_path):
    (tmp_path / "g.json").write_text('{"base":\n {"r": 8 "lr": 1}}')
    error = clear_error(cli("sweep", tmp_path / "g.json"))
    assert "g.json: is not JSON" in error and "at line 2, column" in error


@pytest.mark.parametrize("name", ["grid.json", "grid-cord.json"])
def test_the_grids_of_the_repository(name):
    found = read_plan(ROOT / name)
    assert [point.name.split("=")[0] for point in found.points] == ["base", "r", "r", "alpha", "dropout", "lr"]
    assert dict(options(found.points[:3], "r", "alpha")) == {8: 16, 16: 32, 32: 64}
    assert options(found.points[3:4], "r", "alpha") == [(32, 32)]
    assert set(options(found.points, "dropout")) == {(0.0,), (0.05,)}
    rates = {lr for (lr,) in options(found.points, "lr")}
    assert rates == ({2e-4, 2e-5} if "cord" in name else {OPTIONS["lr"].default, OPTIONS["lr"].default / 10})
