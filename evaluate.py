"""Evaluate a finished run: the base and the best adapter side by side, on generated text.

python evaluate.py runs/NAME
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from PIL import Image

from im2json.cli import quiet_libraries, user_errors
from im2json.runs import RunFolder, locked


@click.command()
@click.argument("run", type=click.Path(path_type=Path), metavar="RUN")
@click.option("--split", type=click.Choice(["train", "validation", "test"]), default="test", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="print the metrics as JSON instead of a table")
def main(run: Path, split: str, as_json: bool) -> None:
    """Score the base and the best adapter of RUN on a split, side by side.

    Writes every prediction to RUN/predictions.jsonl, and one picture with the text before and after.
    """
    with user_errors():
        folder = RunFolder(run)
        metrics = evaluate(folder, split)
        if metrics is None:
            return
        if as_json:
            click.echo(json.dumps(metrics, indent=2))
            return
        from im2json.report.table import before_after_table

        click.echo(f"{split} split, generated text:\n{before_after_table(metrics['before'], metrics['after'])}\n")
        click.echo(f"predictions  {folder.predictions}\npicture      {run / f'{split}.png'}")


def evaluate(run: RunFolder, split: str) -> dict[str, dict[str, float]] | None:
    """The metrics before and after; None on all processes but the main one."""
    quiet_libraries()
    config = run.read_config()
    from im2json.inference.workbench import set_up, start_accelerator
    from im2json.model.lora import adapter_folder

    config = config.replace(adapter=str(adapter_folder(run.path)), gradient_checkpointing=False)
    accelerator, precision = start_accelerator(config)
    bench = set_up(config, accelerator, precision)
    with locked(run, accelerator.is_main_process):
        evaluation = bench.evaluation(run, FirstPicture(run.path / f"{split}.png"))
        result: dict[str, Any] = (
            json.loads(run.result.read_text("utf-8")) if run.done else {"step": 0, "best_step": None}
        )
        metrics = {
            "before": evaluation(split, 0, "before", adapter=False),
            "after": evaluation(split, result["best_step"] or result["step"], "after"),
        }
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
