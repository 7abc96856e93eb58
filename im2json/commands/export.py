"""A finished run's model as a folder for others, or its model card alone."""

from __future__ import annotations

from pathlib import Path

import click

from im2json.cli import quick_start, quiet_libraries
from im2json.runs import RunFolder


def print_card(run: RunFolder, title: str, adapter_only: bool) -> None:
    """Print the model card, and write nothing.

    Raises:
        UserError: if the run has no answers on the test split.
    """
    quiet_libraries()
    from im2json.report.modelcard import model_card
    from im2json.scoring.examples import kept_predictions, score_predictions

    click.echo(model_card(run, score_predictions(kept_predictions(run, "test")), title, adapter_only), nl=False)


def export(
    run: RunFolder, out: Path, title: str, adapter_only: bool, parity: float | None, merge_dtype: str,
    quant: str, push_to_hub: str | None, private: bool,
) -> None:  # fmt: skip
    """Write the model of a run to a new folder, and upload it with --push-to-hub.

    Args:
        title: the model's name in its model card.
        adapter_only: copy the adapter instead of merging it.
        parity: share of the run's validation answers that the exported weights have to repeat.
        merge_dtype: of the merged weights, bf16 or fp32.
        quant: storage of their linear layers, none or nf4.
        push_to_hub: the name of a new model on the hub.

    Raises:
        UserError: naming what is missing or does not fit.
    """
    quiet_libraries()
    from im2json.model.hub import check_push, push

    if push_to_hub is not None:
        check_push(push_to_hub)
    with quick_start():
        from im2json.inference.export import LEAST, export_run
        from im2json.model.base import DTYPES
    click.echo(f"copying the adapter of {run.path}" if adapter_only else f"merging {run.path} into its base model")
    least = LEAST if parity is None else parity
    found = export_run(run, out, adapter_only, least, title, DTYPES[merge_dtype], quant == "nf4")
    if found is not None:
        click.echo(f"plain transformers on the exported folder: {found}")
    click.echo(f"exported  {out}")
    if push_to_hub is not None:
        click.echo(f"uploaded  {push(out, push_to_hub, private)}")
