"""What a trained run is good for.

python -m im2json extract RUN PICTURES...        JSON of pictures that nobody has labelled
python -m im2json export RUN --out DIR           weights for transformers and vLLM, or the adapter alone
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from im2json.cli import FloatRange, option_flags, user_errors


@click.group()
def main() -> None:
    """Read pictures with a trained run, and take it elsewhere."""


@main.command()
@click.argument("run")
@click.argument("pictures", nargs=-1, required=True)
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="the rows' file, gone on with if it is there"
)
@option_flags(
    "model",
    "quant",
    "precision",
    "prompt",
    "letterbox",
    "max_new_tokens",
    "eval_batch_size",
    "constrain",
    "schema",
    "check_sum",
    "threads",
)
@click.pass_context
def extract(context: click.Context, run: str, pictures: tuple[str, ...], out: Path | None) -> None:
    """Read PICTURES (files, folders, patterns) with the best adapter of RUN: a row of JSON each, in their order.

    RUN may also be a folder with a LoRA adapter in PEFT's format, or one on the hub. Options not given are the run's.
    A picture that cannot be read gets a row that says why, and makes the exit status 1.

    With --out, rows are added as they come, and pictures that have one are passed over: the same command goes on where
    a job was stopped. A picture is known by its name; to have it read again, remove its row.
    """
    with user_errors("the rows so far are kept; the same command goes on" if out else "nothing was kept without --out"):
        from im2json.commands.extract import extract as extract_rows

        failed, total = extract_rows(run, pictures, out, context.obj or {})
    if failed:
        click.echo(f"{failed} of {total} pictures could not be read; their rows say why", err=True)
        sys.exit(1)


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="DIR", help="a new folder")
@click.option("--adapter-only", is_flag=True, help="the adapter in PEFT's format instead of merged weights")
@click.option(
    "--parity",
    type=FloatRange(0, 1),
    metavar="SHARE",
    help="of the run's validation answers that the exported weights have to repeat to the letter  [default: 0.9]",
)
@click.option("--push-to-hub", metavar="OWNER/NAME", help="upload it as a new model")
@click.option("--private", is_flag=True, help="for you alone, with --push-to-hub")
@click.option("--dry-run", is_flag=True, help="print the model's card, and write nothing")
def export(
    run: Path,
    out: Path,
    adapter_only: bool,
    parity: float | None,
    push_to_hub: str | None,
    private: bool,
    dry_run: bool,
) -> None:
    """Write the model of RUN to a folder for others: merged bf16 weights and processor, as transformers and vLLM load
    them, with a model card.

    The folder is loaded by plain transformers in a process of its own and answers up to 32 validation examples; unless
    enough of the answers are the run's, nothing is exported.
    """
    if adapter_only and parity is not None:
        raise click.UsageError("--parity goes with merged weights: the adapter alone is a copy")
    with user_errors("nothing was exported"):
        from im2json.commands.export import export as write_export
        from im2json.commands.export import print_card
        from im2json.runs import RunFolder

        title = push_to_hub or out.absolute().name
        if dry_run:
            print_card(RunFolder(run), title, adapter_only)
        else:
            write_export(RunFolder(run), out, title, adapter_only, parity, push_to_hub, private)


if __name__ == "__main__":
    main()
