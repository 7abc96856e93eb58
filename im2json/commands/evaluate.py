"""A finished run, scored again: the base and the best adapter on a split."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from accelerate.utils import broadcast_object_list
from PIL import Image

from im2json.options import TrainConfig
from im2json.records import EvaluationKey
from im2json.report.run import write_report
from im2json.runs import RunFolder, adapter_folder, locked
from im2json.scoring.examples import calibrate, calibration_predictions
from im2json.training.stopping import watched_peers
from im2json.workspace import open_workspace, start_accelerator


def evaluate(
    run: RunFolder, config: TrainConfig, split: str, schema: Path | None
) -> dict[str, dict[str, float]] | None:
    """Score the base and the best adapter of a run, and leave predictions, calibration, report and a picture.

    Args:
        config: the run's, with some options replaced.
        schema: the file to take in place of --schema.

    Returns:
        The metrics before and after; None on all processes but the main one.

    Raises:
        UserError: naming the option, file or row that is wrong.
    """
    adapter = adapter_folder(run.path)
    accelerator, precision = start_accelerator(config)
    with watched_peers(accelerator, "evaluate once more"):
        workspace = open_workspace(
            config, accelerator, precision, adapter=adapter, schema=schema, evaluated=run, scored=split
        )
        constrained = workspace.settings.grammar is not None
        with locked(run, accelerator.is_main_process):
            evaluation = workspace.evaluation(run, FirstPicture(run.path, split))
            step = run.kept_step
            metrics = {
                "before": evaluation(split, 0, "before", adapter=False),
                "after": evaluation(split, step, "after"),
            }
            alike = [known.constrained == constrained for known in calibration_predictions(run, step)]
            (calibrated,) = broadcast_object_list([run.done and bool(alike) and all(alike)])
            # If not, the run never validated this adapter in this way, or kept no confidence.
            if not calibrated and len(workspace.splits["validation"]):
                evaluation("validation", step, "after")
            if accelerator.is_main_process:
                calibrate(run, step)
                write_report(run, split, workspace.pictures(split), metrics["before"])
    accelerator.end_training()
    return metrics if accelerator.is_main_process else None


class FirstPicture:
    """An evaluation's sink that keeps the picture of a split's first example, with its text before and after."""

    def __init__(self, folder: Path, split: str) -> None:
        self.path = folder / f"{split}.png"
        self.split = split

    def scalars(self, split: str, step: int, values: dict[str, float], stage: str | None = None) -> None:
        """Do nothing: the metrics are printed as a table."""

    def picture(self, key: EvaluationKey, index: int, draw: Callable[[], Image.Image]) -> None:
        """Write RUN/SPLIT.png."""
        if (key.split, key.stage, index) == (self.split, "after", 0):
            draw().save(self.path)
