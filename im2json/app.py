"""The command line: every command with its flags, each of which reads them and makes one call.

im2json train --r 16                      the embedded base model and receipts, no network and no GPU needed
im2json train --preset cord               PaliGemma-3B on CORD v2, one 16 GB GPU; also qwen, gemma3, smolvlm and more
im2json check --dataset FOLDER            look at the data first
im2json plan --preset cord                forecast the steps, memory and time of a run
im2json evaluate runs/NAME                the base and the best adapter, field by field
im2json compare runs/A runs/B             which differences between two runs exceed the noise
im2json score FILE.jsonl                  score answers of any system
im2json sweep grid.json                   an ablation grid
im2json extract runs/NAME PICTURES...     JSON of new pictures
im2json serve runs/NAME                   an HTTP server that reads pictures
im2json export runs/NAME --out DIR        weights for transformers and vLLM, or the adapter alone

`python -m im2json` and `accelerate launch -m im2json` take the same commands. train.py, evaluate.py and sweep.py are
three of these commands as scripts. Torch is imported only once the flags are known to be right.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import click

from im2json import __version__
from im2json.catalogue import METRICS
from im2json.cli import (
    Command,
    FloatRange,
    GroupedCommand,
    Interrupted,
    UserPath,
    option_flags,
    preset_flag,
    quiet_libraries,
    resume_advice,
    user_errors,
)
from im2json.commands.serve import LOOPBACK
from im2json.commands.sweep import SweepOptions, list_points
from im2json.commands.sweep import sweep as run_sweep
from im2json.data.names import Shard
from im2json.errors import UserError
from im2json.options import TrainConfig, flag_name
from im2json.records import SPLITS
from im2json.resume import EVALUATION_OPTIONS, EXTRACTION_OPTIONS, evaluated_config, fresh_options, training_config
from im2json.runs import RunFolder

FILE = UserPath(exists=True, dir_okay=False, path_type=Path)
PATH = UserPath(path_type=Path)

price_flag = click.option(
    "--price-per-hour",
    type=FloatRange(0),
    metavar="FLOAT",
    help="Price of the machine for an hour. The forecast then also says what the run costs.",
)
split_flag = click.option(
    "--split",
    type=click.Choice(SPLITS),
    default="test",
    show_default=True,
    help="Split whose answers are scored.",
)
json_flag = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")


class _Commands(click.Group):
    """List the commands in the order of a user's work, which is the order in which this file declares them."""

    command_class = Command

    def list_commands(self, context: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_Commands)
@click.version_option(__version__, prog_name="im2json")
def main() -> None:
    """Fine-tune a vision-language model to turn pictures of documents into JSON, and know how good that JSON is."""


# --- train, check, plan


@main.command(cls=GroupedCommand, short_help="Fine-tune a model on pictures and their JSON.")
@preset_flag
@option_flags()
@click.option(
    "--resume",
    type=UserPath(),
    metavar="PATH",
    help="Run folder of a stopped run to continue from its last checkpoint.",
)
@click.option(
    "--stop-after",
    type=click.IntRange(1),
    metavar="N",
    help="Stop after this step and keep a checkpoint. The learning rate follows the schedule of the whole run.",
)
@click.option(
    "--check", "only_check", is_flag=True, help="Check the data and write an HTML report on it, without training."
)
@click.option(
    "--plan", "only_plan", is_flag=True, help="Forecast the steps, memory and time of the run from a few steps."
)
@price_flag
@click.pass_context
def train(
    context: click.Context,
    preset: str | None,
    resume: str | None,
    stop_after: int | None,
    only_check: bool,
    only_plan: bool,
    price_per_hour: float | None,
) -> None:
    """Fine-tune a vision-language model with QLoRA to turn pictures of documents into JSON."""
    if only_check and only_plan:
        raise click.UsageError("--check and --plan: give one of the two")
    if (only_check or only_plan) and (resume is not None or stop_after is not None):
        flag = "--check" if only_check else "--plan"
        raise click.UsageError(f"{flag} goes with the options of a fresh run, not with --resume or --stop-after")
    if price_per_hour is not None and not only_plan:
        raise click.UsageError("--price-per-hour goes with --plan")
    if only_check:
        _check(context, preset)
    elif only_plan:
        _plan(context, preset, price_per_hour)
    else:
        _train(context, preset, resume, stop_after)


@main.command(cls=GroupedCommand, short_help="Check the data of a run, without training.")
@preset_flag
@option_flags()
@click.pass_context
def check(context: click.Context, preset: str | None) -> None:
    """Check the data of a run and write an HTML report on it, without training.

    The exit status is 1 if a run would refuse the data.
    """
    _check(context, preset)


@main.command(cls=GroupedCommand, short_help="Forecast the steps, memory and time of a run.")
@preset_flag
@option_flags()
@price_flag
@click.pass_context
def plan(context: click.Context, preset: str | None, price_per_hour: float | None) -> None:
    """Forecast the steps, memory and time of a run from a few real steps, which are then discarded."""
    _plan(context, preset, price_per_hour)


def _train(context: click.Context, preset: str | None, resume: str | None, stop_after: int | None) -> None:
    with user_errors("no step was taken yet"):
        stopped = None if resume is None else RunFolder(Path(resume))
        config = training_config(stopped, context.obj or {}, preset)
        quiet_libraries()
        from im2json.commands.train import Ending, train

        ending, run = train(config, stopped, stop_after)
        if ending is Ending.ASKED:
            raise Interrupted(f"interrupted: {resume_advice(run.path)}")


def _check(context: click.Context, preset: str | None) -> None:
    with user_errors("nothing was written"):
        config = _fresh_config(context, preset)
        quiet_libraries()
        from im2json.commands.check import check

        sys.exit(0 if check(config) else 1)


def _plan(context: click.Context, preset: str | None, price: float | None) -> None:
    with user_errors("nothing was kept"):
        config = _fresh_config(context, preset)
        quiet_libraries()
        from im2json.commands.plan import plan

        plan(config, price)


def _fresh_config(context: click.Context, preset: str | None) -> TrainConfig:
    return TrainConfig.resolve(fresh_options(context.obj or {}, preset), preset)


# --- evaluate, compare, score


@main.command(short_help="Score a run before and after training.")
@click.argument("run", required=False, type=PATH, metavar="[RUN]")
@split_flag
@click.option(
    "--predictions",
    type=FILE,
    metavar="PATH",
    help="JSON-lines file of predictions to score instead of a run. Each row has a prediction, and a target or an id.",
)
@click.option(
    "--targets",
    type=FILE,
    metavar="PATH",
    help="JSON-lines file with the target and id of each example, for predictions without targets.",
)
@click.option(
    "--against", type=PATH, metavar="PATH", help="Run whose answers are compared with those of RUN, without a model."
)
@click.option(
    "--target-precision",
    type=FloatRange(0, 1, min_open=True, max_open=True),
    metavar="FLOAT",
    help="Share of the kept fields that must be right. Prints the confidence that reaches it and how much is kept.",
)
@json_flag
@option_flags(*EVALUATION_OPTIONS)
@click.pass_context
def evaluate(
    context: click.Context, run: Path | None, split: str, predictions: Path | None, targets: Path | None,
    against: Path | None, target_precision: float | None, as_json: bool,
) -> None:  # fmt: skip
    """Score the base and the best adapter of RUN on a split, side by side.

    Writes every prediction to RUN/predictions.jsonl, RUN/report.html to look at, and one picture with the text before
    and after. With --against nothing is generated: the answers that both runs kept are compared, example by example.
    With --predictions no run is needed.
    """
    if (run is None) == (predictions is None):
        raise click.UsageError("give a RUN or --predictions FILE, one of the two")
    if (against and run is None) or (targets and predictions is None):
        raise click.UsageError("--against goes with a RUN, --targets with --predictions")
    if target_precision is not None and (against or predictions):
        raise click.UsageError("--target-precision goes with a RUN alone")
    if context.obj and (against or predictions):
        raise click.UsageError(f"nothing is generated here: leave {', '.join(map(flag_name, context.obj))} out")
    if predictions is not None:
        _score(predictions, targets, split, as_json)
    elif against is not None:
        assert run is not None
        _compare(run, against, split, as_json)
    else:
        assert run is not None
        _evaluate(RunFolder(run), split, context.obj or {}, target_precision, as_json)


@main.command(short_help="Compare the answers of two runs.")
@click.argument("run", type=PATH)
@click.argument("against", type=PATH)
@split_flag
@json_flag
def compare(run: Path, against: Path, split: str, as_json: bool) -> None:
    """Compare the answers that the runs RUN and AGAINST kept of the same examples, without a model."""
    _compare(run, against, split, as_json)


@main.command(short_help="Score answers of any system.")
@click.argument("predictions", type=FILE)
@click.option(
    "--targets",
    type=FILE,
    metavar="PATH",
    help="JSON-lines file with the target and id of each example, for predictions without targets.",
)
@split_flag
@json_flag
def score(predictions: Path, targets: Path | None, split: str, as_json: bool) -> None:
    """Score the rows of PREDICTIONS, a JSON-lines file from any system, without a model.

    Each row has a prediction, and a target or an id. Of the file of a run, --split selects the rows.
    """
    _score(predictions, targets, split, as_json)


def _evaluate(run: RunFolder, split: str, given: dict[str, Any], target_precision: float | None, as_json: bool) -> None:
    with user_errors():
        config = evaluated_config(run, given)
        quiet_libraries()
        from im2json.commands.evaluate import evaluate
        from im2json.report.comparison import run_report

        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the result
            metrics = evaluate(run, config, split, None if "schema" in given else run.schema)
        if metrics:
            click.echo(run_report(run, split, metrics, target_precision, as_json))


def _compare(run: Path, against: Path, split: str, as_json: bool) -> None:
    with user_errors():
        from im2json.commands.score import compare

        compare(RunFolder(run), RunFolder(against), split, as_json)


def _score(predictions: Path, targets: Path | None, split: str, as_json: bool) -> None:
    with user_errors():
        from im2json.commands.score import score

        sys.exit(0 if score(predictions, targets, split, as_json) else 1)


# --- sweep


@main.command(short_help="Run an ablation grid and rank its points.")
@click.argument("grid", type=FILE)
@click.option("--output", type=PATH, metavar="PATH", help="Folder of the sweep; runs/NAME for NAME.json by default.")
@click.option("--jobs", type=click.IntRange(1), metavar="N", help="Points at a time; 1 on a CPU, else one per GPU.")
@click.option("--gpus-per-run", type=click.IntRange(1), metavar="N", help="GPUs for each point; 1 by default.")
@click.option(
    "--ray",
    metavar="HOST:PORT",
    help="Address of a Ray cluster that runs the points, or auto. All its machines must see the sweep's folder.",
)
@click.option(
    "--halve",
    metavar="NAME",
    type=click.Choice(list(METRICS)),
    help="Metric of successive halving, which drops the worse half of the settings at each rung of validations.",
)
@click.option(
    "--set", "overrides", multiple=True, metavar="NAME=VALUE", help="Value that replaces one in the grid's base."
)
@click.option("--dry-run", is_flag=True, help="Only print the points, their states and their commands.")
@click.option("--list", "as_list", is_flag=True, help="Only print a command for each point that is not done.")
def sweep(dry_run: bool, as_list: bool, **flags: Any) -> None:
    """Run the points of GRID, rank them by the text that they generate, and score the winner on the test split.

    The same command continues a sweep: it keeps finished points, resumes stopped ones, and adds new ones.
    """
    options = SweepOptions(**flags)
    if options.halve is not None and (dry_run or as_list):
        raise click.UsageError("--halve decides while it runs which points go on: leave out --dry-run and --list")
    with user_errors("the same command goes on"):
        if dry_run or as_list:
            list_points(options, with_states=dry_run, elsewhere=as_list)
        elif not run_sweep(options):
            sys.exit(1)


# --- extract, serve, export


def _read_shard(context: click.Context, parameter: click.Parameter, text: str) -> Shard:
    try:
        return Shard.parse(text)
    except UserError as error:
        raise click.UsageError(str(error), context) from None


@main.command(short_help="Read new pictures with a trained run.")
@click.argument("run", type=UserPath(readable=False))
@click.argument("pictures", nargs=-1, type=UserPath(readable=False))
@click.option(
    "--files-from",
    type=UserPath(exists=True, dir_okay=False, allow_dash=True, path_type=Path),
    metavar="PATH",
    help="Text file with the name of a picture on each line, or - for the standard input. No patterns.",
)
@click.option(
    "--null", is_flag=True, help="Names in --files-from end with a NUL character, as `find -print0` writes them."
)
@click.option(
    "--out",
    type=UserPath(dir_okay=False, path_type=Path),
    metavar="PATH",
    help="JSON-lines file for the rows. Rows that it already has are kept.",
)
@click.option(
    "--shard",
    default="1/1",
    metavar="I/N",
    callback=_read_shard,
    help="Read only the I-th of N equal parts of the pictures. Joined in order, the outputs equal that of one job.",
)
@click.option(
    "--jobs",
    type=click.IntRange(1),
    metavar="N",
    help="Processes that share the pictures. More than one needs --out. Default: one per GPU, or 1 on a CPU.",
)
@click.option(
    "--ray",
    metavar="HOST:PORT",
    help="Address of a Ray cluster that runs the workers, or auto. All its machines must see the run, the pictures and "
    "the folder of --out.",
)
@option_flags(*EXTRACTION_OPTIONS)
@click.pass_context
def extract(
    context: click.Context, run: str, pictures: tuple[str, ...], files_from: Path | None, null: bool,
    out: Path | None, shard: Shard, jobs: int | None, ray: str | None,
) -> None:  # fmt: skip
    """Read PICTURES (files, folders, patterns) with the best adapter of RUN: a row of JSON each, in their order.

    RUN may also be a folder with a LoRA adapter in PEFT's format, or one on the hub. Options not given are the run's.
    A picture that cannot be read gets a row that says why, and makes the exit status 1.

    With --out, rows are added as they come, and pictures that have one are passed over: the same command goes on where
    a job was stopped. A picture is known by its name; to have it read again, remove its row. Several workers write to
    OUT.parts, and their rows are added to OUT once all have finished.
    """
    if not pictures and files_from is None:
        raise click.UsageError("give PICTURES, --files-from, or both")
    if null and files_from is None:
        raise click.UsageError("--null goes with --files-from")
    if out is None and (ray is not None or (jobs or 1) > 1):
        raise click.UsageError(f"{'--jobs above 1' if ray is None else '--ray'} needs --out, where the rows are joined")
    with user_errors("the rows so far are kept; the same command goes on" if out else "nothing was kept without --out"):
        from im2json.commands.extract import Selection
        from im2json.commands.extract import extract as extract_rows

        selection = Selection(pictures, files_from, null, shard)
        failed, total = extract_rows(run, selection, out, context.obj or {}, jobs, ray)
    if failed:
        click.echo(f"{failed} of {total} pictures could not be read; their rows say why", err=True)
        sys.exit(1)


@main.command(short_help="Read pictures over HTTP with a trained run.")
@click.argument("run", type=UserPath(readable=False))
@click.option(
    "--host",
    metavar="HOST",
    default=LOOPBACK[0],
    show_default=True,
    help="Address to listen at. Only this machine reaches the default; other addresses need --token.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    metavar="N",
    default=8000,
    show_default=True,
    help="Port to listen at. 0 takes a free one.",
)
@click.option(
    "--token",
    metavar="TEXT",
    envvar="IM2JSON_TOKEN",
    show_envvar=True,
    help="Secret that clients must send, as Authorization: Bearer TEXT.",
)
@click.option(
    "--max-megabytes",
    type=FloatRange(0, min_open=True),
    metavar="FLOAT",
    default=20.0,
    show_default=True,
    help="Size limit of a picture file.",
)
@click.option(
    "--max-requests",
    type=click.IntRange(1),
    metavar="N",
    default=64,
    show_default=True,
    help="Requests that the server works on at the same time. It refuses more with status 429.",
)
@option_flags(*EXTRACTION_OPTIONS)
@click.pass_context
def serve(
    context: click.Context, run: str, host: str, port: int, token: str | None, max_megabytes: float, max_requests: int
) -> None:
    """Answer HTTP requests with the best adapter of RUN: a picture file in, its JSON out.

    POST the file to /extract, or open the page at / and drop it there. RUN and the options are those of `im2json
    extract`. Before it stops, the server answers the requests that it has accepted.
    """
    if host not in LOOPBACK and not token:
        raise click.UsageError(f"--host {host} lets other machines in: set --token, or IM2JSON_TOKEN")
    if token is not None and (not token.isascii() or token.split() != [token]):
        raise click.UsageError("--token: expected ASCII characters without spaces")
    with user_errors("the server did not start"):
        from im2json.commands.serve import serve as answer_requests

        answer_requests(run, host, port, token, max_megabytes, max_requests, context.obj or {})


@main.command(short_help="Write the model of a run for transformers, vLLM or the hub.")
@click.argument("run", type=PATH)
@click.option("--out", type=PATH, required=True, metavar="PATH", help="New folder for the model.")
@click.option("--adapter-only", is_flag=True, help="Write the adapter in PEFT's format instead of merged weights.")
@click.option(
    "--parity",
    type=FloatRange(0, 1),
    metavar="FLOAT",
    help="Share of the run's validation answers that the exported weights must repeat to the letter.  [default: 0.9]",
)
@click.option(
    "--merge-dtype",
    type=click.Choice(["bf16", "fp32"]),
    default="bf16",
    show_default=True,
    help="Type of the merged weights. Take fp32 where rounding to bf16 changes too many answers.",
)
@click.option(
    "--quant",
    type=click.Choice(["none", "nf4"]),
    default="none",
    show_default=True,
    help="Storage of the merged linear layers. nf4: 4 bits, which bitsandbytes loads without the original base.",
)
@click.option("--push-to-hub", metavar="OWNER/NAME", help="Name of a new model on the hub to upload it as.")
@click.option("--private", is_flag=True, help="Make the uploaded model visible to you alone.")
@click.option("--dry-run", is_flag=True, help="Only print the model card.")
def export(
    run: Path, out: Path, adapter_only: bool, parity: float | None, merge_dtype: str, quant: str,
    push_to_hub: str | None, private: bool, dry_run: bool,
) -> None:  # fmt: skip
    """Write the model of RUN to a folder for others: merged weights and processor, as transformers and vLLM load them,
    with a model card.

    The folder is loaded by plain transformers in a process of its own and answers up to 32 validation examples. Unless
    enough of the answers are the run's, nothing is exported. The field F1 of the run, of the merged weights and of
    plain transformers is printed, with the 95 % interval of each difference from the run.
    """
    merging = {"--parity": parity is not None, "--merge-dtype": merge_dtype != "bf16", "--quant": quant != "none"}
    for name, chosen in merging.items():
        if adapter_only and chosen:
            raise click.UsageError(f"{name} goes with merged weights: the adapter alone is a copy")
    with user_errors("nothing was exported"):
        from im2json.commands.export import export as write_export
        from im2json.commands.export import print_card

        title = push_to_hub or out.absolute().name
        if dry_run:
            print_card(RunFolder(run), title, adapter_only)
        else:
            write_export(RunFolder(run), out, title, adapter_only, parity, merge_dtype, quant, push_to_hub, private)
