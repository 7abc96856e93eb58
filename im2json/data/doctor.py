"""Describe a data set without training, for `im2json check`."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from im2json.data.check import Checkup, examine
from im2json.data.collate import IGNORE, Collator
from im2json.data.example import Example, RunSplit
from im2json.data.lengths import TargetLengths, TargetMeter
from im2json.data.sources import open_splits
from im2json.data.splits import RunSplits, divide
from im2json.data.stored import listed
from im2json.errors import UserError
from im2json.options import DataOptions
from im2json.report.preview import Preview, preview_page
from im2json.report.table import counted, table
from im2json.scoring.metrics import key_paths

PREVIEWS = 6
"""Examples on the page, of train."""


SMALL = 0.5
"""Pictures that are scaled down further may lose small print."""


def diagnose(options: DataOptions, meter: TargetMeter | None, page: Path, say: Callable[[str], object]) -> bool:
    """Say all that is known of the data, part by part, and write the page.

    Args:
        meter: measures the targets. If it is None, nothing is said of their lengths, and no page is written.
        say: called with each part.

    Returns:
        Whether a run would take the rows, as far as --skip-bad goes.

    Raises:
        UserError: if the data set cannot be opened or `page` is a file of another kind; and, once all else is said, if
            there are too few pictures to cut a missing split from.
    """
    if page.exists() and page.suffix != ".html":
        raise UserError(f"--output {page} exists: with --check it names the .html to write")
    notes: list[str] = []
    checkup = examine(open_splits(options, notes).values(), meter)
    refused = None
    try:
        found = divide(checkup, options.dataset, notes)
    except UserError as error:
        found, refused = RunSplits({name: RunSplit(name, rows) for name, rows in checkup.rows.items()}, checkup), error
    rows = rows_report(checkup, found)
    say("\n".join([*notes, rows]))
    splits = {name: split for name, split in found.splits.items() if len(split)}
    if splits and meter is not None:
        lengths = lengths_report(splits, found.lengths, options.trim)
        say("\n".join(["", lengths, "", keys_report(splits)]))
        first = next(iter(splits.values()))
        previews = (preview(first[i], meter.collator) for i in range(min(PREVIEWS, len(first))))
        page.parent.mkdir(parents=True, exist_ok=True)
        shown = preview_page(f"{options.dataset}: {first.name}", f"{rows}\n\n{lengths}", previews)
        page.write_text(shown, "utf-8")
        say(f"\npreview  {page}")
    elif splits:
        say(f"\n{keys_report(splits)}")
    if refused is not None:
        raise refused
    if len(checkup.bad) > options.skip_bad:
        bad = counted(len(checkup.bad), "bad row")
        say(f"\na run would stop at the {bad} listed above: mend or remove them, or pass --skip-bad {len(checkup.bad)}")
        return False
    return len(splits) == len(found.splits)


def rows_report(checkup: Checkup, found: RunSplits) -> str:
    """Return a table of the rows by split, then every bad row, and what else a reader of results should know."""
    repeated = checkup.copies_within(found.splits)
    counts = [
        [name, len(split), len(checkup.problems.get(name, ())), repeated.get(name, 0)]
        for name, split in found.splits.items()
    ]
    parts = [table(counts, ["split", "rows", "bad", "repeated"])]
    if checkup.bad:
        parts.append(listed(f"bad rows: {len(checkup.bad)} of {checkup.total}", checkup.bad, None))
    shared = checkup.copies_between(found.splits)
    parts.append(listed(f"pictures in more than one split: {len(shared)}", shared, None))
    return "\n\n".join([*parts, *found.warnings()])


def lengths_report(splits: Mapping[str, RunSplit], lengths: TargetLengths, trim: str) -> str:
    """Return lines on how long the targets are, and the longest one of each split."""
    longest = [
        f"longest of {name}: {split.ids[int(np.argmax(lengths.by_split[name]))]}" for name, split in splits.items()
    ]
    return "\n".join([lengths.summary(), *longest, *pictures_report(splits, trim)])


def pictures_report(splits: Mapping[str, RunSplit], trim: str) -> list[str]:
    """Return lines on how many tokens pictures take, and how much smaller the model sees them than they are."""
    rows = [row for split in splits.values() for row in split.rows if row.image_tokens]
    if not rows:
        return []
    tokens = np.array([row.image_tokens for row in rows])
    whole = np.array([row.image_tokens + row.tokens for row in rows])
    scale = np.array([row.scale for row in rows])
    vary = tokens.min() < tokens.max()
    lines = [f"every picture takes {tokens.min()} image tokens"]
    if vary:
        lines = [f"pictures take {_spread(tokens)} image tokens, and {_spread(whole)} with their targets"]
    if trim != "off":
        kept = np.array([row.kept for row in rows if row.kept < 1])
        cut = f", to {np.median(kept):.0%} of their size (median)" if len(kept) else ""
        lines.append(f"--trim {trim} cuts {len(kept)} of {len(rows)} pictures{cut}")
    if small := int((scale < SMALL).sum()):
        more = " or more --image-tokens" if vary else ""
        lines.append(
            f"pictures that the model sees in less than {SMALL:.0%} of their size: {small} of {len(rows)} (median "
            f"{np.median(scale):.0%}); if their print cannot be read on the page, use a base of larger resolution{more}"
        )
    return lines


def _spread(values: np.ndarray) -> str:
    return f"{values.min()} to {values.max()} (median {np.median(values):.0f})"


def keys_report(splits: Mapping[str, RunSplit]) -> str:
    """Return a table of key paths without list positions, with the share of the examples that have each."""
    targets = [target for split in splits.values() for target in split.targets]
    counts = Counter(path for target in targets for path in key_paths(target))
    frequent = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return table([[path, count / len(targets)] for path, count in frequent], ["key", "share of examples"])


def preview(example: Example, collator: Collator) -> Preview:
    """Return the example as a batch of its own holds it."""
    batch = collator([example])
    tokenizer = collator.processor.tokenizer
    tokens: list[tuple[str, bool]] = []
    for token, repeated in itertools.groupby(zip(batch.inputs["input_ids"][0].tolist(), batch.labels[0].tolist())):
        id, label, count = *token, len(list(repeated))
        text = tokenizer.decode([id])
        if "\ufffd" in text:  # a byte of a rare character is no text by itself
            text = tokenizer.convert_ids_to_tokens(id)
        if id == collator.image_token:
            tokens.append((f"{text} x {count}", False))
        else:
            tokens += [(text, label != IGNORE)] * count
    return Preview(example.id, example.image, collator.seen(batch.inputs), example.target, tokens)
