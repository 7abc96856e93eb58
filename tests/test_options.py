"""Options are declared once: flags, checks, presets and what the scripts load before they are needed."""

from __future__ import annotations

import json
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

import train
from im2json import app
from im2json.catalogue import METRICS
from im2json.errors import UserError
from im2json.options import OPTIONS, PRESETS, TrainConfig, check, flag_name

OTHER_VALUES = {
    "dataset": "a-folder", "dataset_config": "en", "revision": "v2", "train_split": "training",
    "image_column": "scan", "target_column": "label", "skip_bad": 2, "letterbox": True,
    "image_tokens": 300, "trim": "crop", "prefix_mask": "picture",
    "prompt": "read it", "max_target_tokens": 90, "workers": 3,
    "model": "somewhere", "adapter": "there", "r": 8, "alpha": 5.0, "dropout": 0.25, "target_modules": "q_proj",
    "rslora": True, "dora": True, "quant": "none", "precision": "fp32", "gradient_checkpointing": "off",
    "launch": "compiled", "dequantize": "on", "cache_features": 0.5,
    "max_new_tokens": 77, "constrain": True, "schema": "mine.json", "eval_batch_size": 3, "check_sum": "a = b",
    "lr": 0.5, "schedule": "linear", "warmup": 0.5, "weight_decay": 0.1,
    "max_grad_norm": 2.0, "epochs": 1.5, "steps": 7, "batch_size": 6, "microbatch": 3, "optimizer": "adamw",
    "eval_every": 4, "eval_examples": 9, "metric": "edit_distance", "patience": 2, "save_every": 6, "keep": 5,
    "seed": 3, "test": False, "output": "out", "track": "wandb", "threads": 1,
}  # fmt: skip


def as_flags(values: dict) -> list[str]:
    flags = []
    for name, value in values.items():
        flag = flag_name(name)
        if isinstance(value, bool):
            flags.append(flag if value else f"--no-{flag[2:]}")
        else:
            flags += [flag, str(value)]
    return flags


@pytest.fixture
def parsed(monkeypatch):
    """`parsed(flags)` is the config that train.py would train with."""

    def parse(flags: list[str]) -> TrainConfig:
        configs: list[TrainConfig] = []
        monkeypatch.setattr("im2json.commands.train.train", lambda config, *more: (configs.append(config), config))
        train.main(flags, standalone_mode=False)
        return configs[0]

    return parse


def test_every_field_has_a_flag_that_sets_it(parsed, monkeypatch):
    monkeypatch.setattr(
        "im2json.resume.fresh_options", lambda given, preset: given
    )  # there is no adapter to take options from
    assert OTHER_VALUES.keys() == OPTIONS.keys()
    otherwise = TrainConfig.resolve({"model": "somewhere else"}).flat()
    assert [name for name, value in OTHER_VALUES.items() if value == otherwise[name]] == []
    assert parsed(as_flags(OTHER_VALUES)).flat() == OTHER_VALUES


def test_help_shows_every_flag_with_its_explanation():
    text = " ".join(CliRunner().invoke(train.main, ["--help"], terminal_width=200).output.split())
    for name, option in OPTIONS.items():
        assert flag_name(name) in text
        assert option.help in text, name


def test_help_is_a_phrase_with_a_type_and_units():
    text = " ".join(CliRunner().invoke(train.main, ["--help"], terminal_width=200).output.split())
    for name, option in OPTIONS.items():
        assert option.help[0].isupper(), name
        assert option.help.endswith("."), name
    for shown in (
        "--steps N Optimizer updates.", "--epochs FLOAT Passes", "--microbatch N|auto Examples", "--output PATH ",
        "--quant [nf4|none] ", "--metric NAME ", "--prompt TEXT ", "--test / --no-test ",
        "[default: 2 epochs]", "[default: 8 GiB]", "[default: 16]", "[default: on]", "[default: field_f1]",
    ):  # fmt: skip
        assert shown in text


def test_defaults_and_alpha(parsed):
    config = parsed([])
    assert (config.model.model, config.data.dataset, config.model.r, config.model.alpha) == (
        "tiny", "receipts", 16, 32.0,
    )  # fmt: skip
    assert parsed(["--r", "4"]).model.alpha == 8.0
    assert parsed(["--r", "4", "--alpha", "3"]).model.alpha == 3.0
    assert parsed(["--alpha", "3"]).model.r == 16


def test_preset_cord_is_the_published_recipe(parsed):
    config = parsed(["--preset", "cord"])
    assert config.model.model == "google/paligemma-3b-pt-224"
    assert config.data.dataset == "naver-clova-ix/cord-v2"
    assert (config.model.r, config.model.alpha, config.model.dropout) == (32, 64.0, 0.05)
    assert (config.train.lr, config.train.epochs, config.train.batch_size) == (2e-4, 3.0, 16)
    assert (config.train.max_grad_norm, config.train.warmup) == (0.3, 0.03)
    assert (config.model.quant, config.train.optimizer) == ("nf4", "paged_adamw_8bit")


def test_flags_override_a_preset_and_its_alpha_follows_r(parsed):
    config = parsed(["--preset", "cord", "--r", "8", "--lr", "0.1"])
    assert (config.model.r, config.model.alpha, config.train.lr) == (8, 16.0, 0.1)
    assert config.train.batch_size == 16
    assert parsed(["--preset", "cord", "--r", "8", "--alpha", "64"]).model.alpha == 64.0


def test_another_model_takes_the_recipe_of_cord_but_not_its_data(parsed):
    cord = TrainConfig.resolve({}, "cord")
    config = parsed(["--model", "google/paligemma2-3b-pt-448"])
    assert (config.train, config.decode) == (cord.train, cord.decode)
    assert (config.model.r, config.model.alpha, config.data.dataset) == (32, 64.0, "receipts")
    assert parsed(["--model", "somewhere", "--preset", "tiny"]).train == TrainConfig.resolve({}).train
    assert parsed(["--model", "tiny"]) == TrainConfig.resolve({})


def test_a_config_survives_its_flat_form():
    for preset in PRESETS:
        config = TrainConfig.resolve({}, preset)
        assert TrainConfig.from_values(config.flat()) == config
        assert config.replace(seed=5).train.seed == 5
        assert config.replace(seed=5).replace(seed=0) == config
    assert TrainConfig.resolve({"lr": 1}) == TrainConfig.resolve({"lr": 1.0})
    assert type(TrainConfig.resolve({"lr": 1}).train.lr) is float


def test_values_are_taken_as_they_are_without_a_preset():
    values = {"model": "google/paligemma2-3b-pt-448", "r": 4}
    config = TrainConfig.from_values(values)
    assert config.train == TrainConfig.from_values({}).train
    assert config.train.lr != TrainConfig.resolve(values).train.lr
    assert (config.model.r, config.model.alpha) == (4, 8.0)
    assert config.replace(r=2).model.alpha == 8.0
    assert config.replace(r=2, alpha=None).model.alpha == 4.0
    with pytest.raises(ValueError, match="did you mean 'batch_size'"):
        TrainConfig.from_values({"bach_size": 3})


@pytest.mark.parametrize(
    ("mistyped", "meant"),
    [
        ("drop_out", "dropout"), ("rr", "r"), ("lettrebox", "letterbox"), ("eval_example", "eval_examples"),
        ("rank", "r"), ("learning_rate", "lr"), ("batch", "batch_size"), ("lora_alpha", "alpha"),
        ("rankk", None), ("x", None), ("warp", None), ("constant", None),
    ],
)  # fmt: skip
def test_only_a_near_name_is_suggested(mistyped, meant):
    """In Python, in a grid and on the command line alike."""
    with pytest.raises(UserError) as error:
        TrainConfig.from_values({mistyped: 3})
    tail = "im2json train --help lists the options" if meant is None else f"did you mean {meant!r}?"
    assert str(error.value) == f"unknown option {mistyped!r}: {tail}"
    result = CliRunner().invoke(train.main, [flag_name(mistyped), "3"])
    question = "" if meant is None else f" Did you mean {flag_name(meant)}?"
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == f"Error: No such option {flag_name(mistyped)}.{question}"


def test_a_command_suggests_its_own_flags_alone():
    for flags, says in (
        (["sweep", "g.json", "--dry_run"], "No such option --dry_run. Did you mean --dry-run?"),
        (["train", "--no-tests"], "No such option --no-tests. Did you mean --no-test?"),
        (["evaluate", "runs/a", "--learning-rate", "1"], "No such option --learning-rate."),
    ):
        assert CliRunner().invoke(app.main, flags).stderr.splitlines()[-1] == f"Error: {says}"


def test_all_problems_are_named_at_once():
    wrong = {
        "r": 0, "dropout": 1.0, "lr": 0, "quant": "int8", "bach_size": 3, "steps": 1.5, "test": "yes", "seed": None,
    }  # fmt: skip
    with pytest.raises(ValueError, match="--r") as error:
        TrainConfig.resolve(wrong)
    lines = str(error.value).splitlines()
    assert len(lines) == len(wrong)
    for line, name in zip(lines, wrong):
        assert name in line or flag_name(name) in line
    assert "did you mean 'batch_size'" in str(error.value)
    assert "nf4, none" in str(error.value)


def test_microbatch_is_a_number_or_auto(parsed):
    assert parsed([]).train.microbatch == 4
    assert parsed(["--microbatch", "auto"]).train.microbatch == "auto"
    assert parsed(["--preset", "cord"]).train.microbatch == "auto"
    assert parsed(["--preset", "cord", "--microbatch", "2"]).train.microbatch == 2
    config = TrainConfig.resolve({"microbatch": "auto"})
    assert TrainConfig.from_values(json.loads(json.dumps(config.flat()))) == config
    with pytest.raises(ValueError, match="--microbatch: 'all' is not a whole number or auto"):
        TrainConfig.resolve({"microbatch": "all"})
    with pytest.raises(ValueError, match=r"--r: 'auto' is not a whole number$"):
        TrainConfig.resolve({"r": "auto"})


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--r", "0"], "at least 1"),
        (["--lr", "nan"], "not a finite number"),
        (["--r", "1" + "0" * 400], "a whole number of more than 300 digits is too large"),
        (["--dropout", "1"], "at most 0.999"),
        (["--warmup", "-0.1"], "at least 0"),
        (["--alpha", "0"], "more than 0"),
        (["--steps", "many"], "not a valid integer"),
        (["--microbatch", "many"], "not a whole number or auto"),
        (["--microbatch", "0"], "at least 1"),
        (["--price-per-hour", "2"], "--plan"),
        (["--metric", "accuracy"], "field_f1"),
        (["--preset", "nord"], "cord"),
        (["--bach-size", "8"], "--batch-size"),
        (["--quant"], "requires an argument"),
    ],
)
def test_a_wrong_flag_is_a_usage_error_that_says_what_is_right(flags, expected):
    result = CliRunner().invoke(train.main, flags)
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    assert flags[0] in result.output
    assert expected in result.output


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="tiny, cord"):
        TrainConfig.resolve({}, "nord")


@pytest.mark.parametrize("metric", METRICS)
def test_any_metric_may_select_the_best_adapter(metric):
    assert TrainConfig.resolve({"metric": metric}).train.metric == metric


def test_defaults_pass_their_own_checks():
    for name, option in OPTIONS.items():
        assert check(name, option.default) is None, name
        words = [None] if option.optional else [option.word]
        assert isinstance(option.default, option.kind) or option.default in words, name


def test_options_that_may_change_on_resume():
    """An option that does not affect the result may always change; these are the others."""
    also = {"constrain", "epochs", "steps", "eval_every", "patience", "test"}
    for name, option in OPTIONS.items():
        assert option.changeable_on_resume == (name in also or not option.affects_result), name
        assert not (name in also and not option.affects_result), name


def test_flags_of_booleans_come_in_pairs(parsed):
    names = [name for name, option in OPTIONS.items() if option.kind is bool]
    assert "test" in names
    for name in names:
        for value in (True, False):
            assert parsed(as_flags({name: value})).flat()[name] is value


HEAVY = ("torch", "transformers", "peft", "datasets", "bitsandbytes", "accelerate")


@pytest.mark.parametrize(
    "code",
    [
        "import im2json; im2json.train, im2json.evaluate, im2json.sweep, im2json.Run, im2json.UserError",
        "from im2json.app import main; main(['--help'])",
        "import im2json.scoring; im2json.scoring.StreamingEvaluator",
        "import im2json.report, im2json.report.table, im2json.report.picture",
        "import runpy; sys.argv = ['train.py', '--help']; runpy.run_path('train.py', run_name='__main__')",
        "import runpy; sys.argv = ['evaluate.py', '--help']; runpy.run_path('evaluate.py', run_name='__main__')",
        "import runpy; sys.argv = ['sweep.py', 'grid.json', '--list']; runpy.run_path('sweep.py', run_name='__main__')",
    ],
)
def test_no_torch_is_imported_before_it_is_needed(code):
    script = (
        "import atexit, sys\n"
        f"atexit.register(lambda: print('loaded:', [m for m in {HEAVY} if m in sys.modules]))\n{code}"
    )
    root = train.__file__.rsplit("/", 1)[0]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded: []"


def test_a_usage_error_names_its_flag_when_called_in_process():
    with pytest.raises(click.BadParameter, match="at least 1"):
        train.main(["--r", "0"], standalone_mode=False)


def test_the_command_lists_its_commands_in_the_order_of_their_use():
    from im2json.app import main

    text = CliRunner().invoke(main, ["--help"]).output
    found = [line.split()[0] for line in text.split("Commands:")[1].splitlines() if line.strip()]
    assert found == ["train", "check", "plan", "evaluate", "compare", "score", "sweep", "extract", "serve", "export"]


def test_every_help_text_is_a_sentence_and_every_metavar_a_type():
    from im2json.app import main

    types = {
        "PATH",
        "TEXT",
        "N",
        "FLOAT",
        "NAME",
        "NAME=VALUE",
        "HOST",
        "HOST:PORT",
        "I/N",
        "OWNER/NAME",
        "auto",
        "NAMES",
    }
    for name, command in main.commands.items():
        for parameter in command.params:
            if not isinstance(parameter, click.Option):
                continue
            assert parameter.help and parameter.help[0].isupper() and "." in parameter.help, (name, parameter.name)
            choices = isinstance(parameter.type, click.Choice)
            named = set((parameter.metavar or "").split("|")) <= types
            assert parameter.is_flag or choices or named, (name, parameter.name, parameter.metavar)


def test_an_option_that_was_added_later_leaves_identities_alone_at_its_default():
    names = ("prompt", "trim", "image_tokens")
    assert TrainConfig.from_values({}).identity(names) == {"prompt": "extract JSON."}
    assert TrainConfig.from_values({"trim": "crop"}).identity(names) == {"prompt": "extract JSON.", "trim": "crop"}
