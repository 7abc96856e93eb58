"""How good is the JSON: of a finished run before and after, of two runs side by side, of predictions made anywhere.

python evaluate.py runs/NAME
python evaluate.py runs/NAME --against runs/OTHER
python evaluate.py --predictions FILE.jsonl [--targets FILE.jsonl]
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import click

from im2json.cli import FloatRange, option_flags, quiet_libraries, user_errors
from im2json.options import flag_name
from im2json.resume import evaluated_config
from im2json.runs import RunFolder

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.argument("run", required=False, type=click.Path(path_type=Path), metavar="[RUN]")
@click.option("--split", type=click.Choice(["train", "validation", "test"]), default="test", show_default=True)
@click.option("--predictions", type=FILE, help="score the rows of this JSON-lines file instead: prediction, target, id")
@click.option("--targets", type=FILE, help="rows of target and id, where the predictions' file has no targets")
@click.option("--against", type=click.Path(path_type=Path), metavar="RUN_B", help="compare with the answers of RUN_B")
@click.option(
    "--target-precision",
    type=FloatRange(0, 1, min_open=True, max_open=True),
    metavar="P",
    help="find how sure a field must be, on validation, for this share of those kept to be right; say what that keeps",
)
@click.option("--json", "as_json", is_flag=True, help="print JSON instead of tables")
@option_flags("precision", "constrain", "schema", "eval_batch_size", "check_sum", "threads")
@click.pass_context
def main(
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
    with user_errors():
        if predictions is not None:
            from im2json.commands.score import score

            sys.exit(0 if score(predictions, targets, split, as_json) else 1)
        assert run is not None
        folder = RunFolder(run)
        if against is not None:
            from im2json.commands.score import compare

            compare(folder, RunFolder(against), split, as_json)
        else:
            given = context.obj or {}
            config = evaluated_config(folder, given)
            quiet_libraries()
            from im2json.commands.evaluate import evaluate  # imports torch, which takes seconds
            from im2json.report.comparison import run_report

            with contextlib.redirect_stdout(sys.stderr):  # stdout is for the result
                metrics = evaluate(folder, config, split, None if "schema" in given else folder.schema)
            if metrics:
                click.echo(run_report(folder, split, metrics, target_precision, as_json))


if __name__ == "__main__":
    main()
