"""python -m im2json.pretrain: make the embedded base again."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click
import torch

from im2json.pretrain.model import SIZES
from im2json.pretrain.train import Settings, pretrain

DEFAULTS = Settings()


@click.command(context_settings={"show_default": True})
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), default=Path("runs/pretrain"))
@click.option("--seed", type=int, default=DEFAULTS.seed, help="of weights and pages")
@click.option("--examples", type=click.IntRange(1), default=DEFAULTS.examples, help="pages seen in all, each once")
@click.option("--minutes", type=click.FloatRange(0), default=DEFAULTS.minutes, help="end in time; 0: no limit")
@click.option("--size", type=click.Choice(list(SIZES)), default=DEFAULTS.size, help="toy is for trying the code out")
@click.option("--from", "start", type=click.Path(exists=True, file_okay=False), default=None,
              help="folder of a model to continue from; its size, not --size")  # fmt: skip
@click.option("--rate", type=click.FloatRange(0, min_open=True), default=DEFAULTS.rate,
              help="times the learning rates; less than 1 suits --from")  # fmt: skip
@click.option("--batch-scale", type=click.FloatRange(0, min_open=True), default=DEFAULTS.batch_scale,
              help="times 512 short, 384 longer or 256 long examples a step")  # fmt: skip
@click.option("--evaluations", type=click.IntRange(1), default=DEFAULTS.evaluations, help="along the run")
@click.option("--evaluation-receipts", type=click.IntRange(1), default=DEFAULTS.evaluation_receipts)
@click.option("--final-receipts", type=click.IntRange(1), default=DEFAULTS.final_receipts)
@click.option("--device", default=lambda: "cuda" if torch.cuda.is_available() else "cpu", help="torch's name for it")
@click.option("--workers", type=click.IntRange(0), default=lambda: max(0, (os.cpu_count() or 1) - 1),
              help="processes that draw pages")  # fmt: skip
@click.option("--compile", is_flag=True, help="compile the towers' layers")
def main(output: Path, device: str, workers: int, **options: object) -> None:
    """Pre-train the embedded base on synthetic receipts, tables and free lines; measure it on unseen receipts."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    settings = Settings(**options)  # type: ignore[arg-type]
    if settings.start:
        if not Path(settings.start, "config.json").is_file():
            raise click.UsageError(f"--from: {settings.start} holds no model, config.json is missing")
        if Path(settings.start).resolve() == output.resolve():
            raise click.UsageError("--from and --output are the same folder, which would lose the first weights")
    click.echo(f"{settings.examples:,} synthetic pages from seed {settings.seed}, {workers} workers, on {device}")
    result = pretrain(settings, output, torch.device(device), workers)
    click.echo(json.dumps(result["measured"], indent=1))
    click.echo(f"{result['seconds']:.0f} s; the model is in {output}")


if __name__ == "__main__":
    main()
