"""How good is the JSON: of a finished run before and after, of two runs side by side, of predictions made anywhere.

python evaluate.py runs/NAME
python evaluate.py runs/NAME --against runs/OTHER
python evaluate.py --predictions FILE.jsonl [--targets FILE.jsonl]
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import click
from PIL import Image

from im2json.cli import FloatRange, option_flags, quiet_libraries, user_errors
from im2json.options import flag_name
from im2json.runs import RunFolder, adapter_folder, locked

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
        from im2json.report import comparison

        if predictions is not None:
            from im2json.scoring.examples import score_files

            card, left_out = score_files(
                predictions, targets, split, lambda line: click.echo(f"Error: {line}", err=True)
            )
            click.echo(comparison.scorecard_report(card, as_json))
            sys.exit(1 if left_out else 0)
        assert run is not None
        if against is not None:
            click.echo(comparison.comparison_report(RunFolder(run), RunFolder(against), split, as_json))
        else:
            with contextlib.redirect_stdout(sys.stderr):  # stdout is for the result
                metrics = evaluate(RunFolder(run), split, context.obj or {})
            if metrics:
                click.echo(comparison.run_report(RunFolder(run), split, metrics, target_precision, as_json))


def evaluate(run: RunFolder, split: str, given: dict[str, Any]) -> dict[str, dict[str, float]] | None:
    """The metrics before and after, with some of the run's options replaced; None on all processes but the main one."""
    quiet_libraries()
    config = run.read_config().replace(**given)
    if "schema" in given and not config.decode.constrain:
        raise ValueError("--schema goes with --constrain")
    adapter = adapter_folder(run.path)
    from accelerate.utils import broadcast_object_list

    from im2json.inference.workbench import set_up, start_accelerator
    from im2json.report.run import write_report
    from im2json.scoring.examples import calibrate, calibration_rows

    accelerator, precision = start_accelerator(config)
    own_schema = None if "schema" in given else run.schema
    bench = set_up(config, accelerator, precision, adapter=adapter, schema=own_schema)
    with locked(run, accelerator.is_main_process):
        evaluation = bench.evaluation(run, FirstPicture(run.path / f"{split}.png"))
        step = run.kept_step
        metrics = {
            "before": evaluation(split, 0, "before", adapter=False),
            "after": evaluation(split, step, "after"),
        }
        alike = [("constrained" in row) == (bench.grammar is not None) for row in calibration_rows(run, step)]
        (known,) = broadcast_object_list([run.done and bool(alike) and all(alike)])
        if not known:  # the run never validated this adapter in this way, or kept no confidence
            evaluation("validation", step, "after")
        if accelerator.is_main_process:
            calibrate(run, step)
            write_report(run, split, bench.pictures(split), metrics["before"])
    accelerator.end_training()
    return metrics if accelerator.is_main_process else None


class FirstPicture:
    """An evaluation's sink that keeps the first example with its text before and after."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def scalars(self, split: str, step: int, values: dict[str, float], **more: Any) -> None:
        """They are in the table."""

    def picture(self, tag: str, picture: Image.Image, step: int) -> None:
        if tag.endswith("_after/0"):
            picture.save(self.path)


if __name__ == "__main__":
    main()
