"""How long the targets are in tokens, and which of them cannot be learned as they are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from im2json.data.collate import Collator
from im2json.errors import UserError
from im2json.jsontext import canonical
from im2json.text import shortened

SHOWN = 30
"""Characters of a target that a note shows around the first difference."""


@dataclass(frozen=True)
class Measured:
    """What the tokenizer makes of a target."""

    tokens: int  # EOS included
    problem: str | None = None  # why the target cannot be learned
    difference: str | None = None  # what is learned in place of a text that the tokens do not hold
    image_tokens: int = 0  # of the picture; 0 if its size was not given
    scale: float = 1.0  # that the model sees the picture in


class TargetMeter:
    """Measures targets before the first step, so that none is ever cut or altered in silence."""

    def __init__(self, collator: Collator, positions: int, limit: int | None = None) -> None:
        """Measure targets for a model.

        Args:
            positions: how many tokens the model can hold, the prefix included.
            limit: --max-target-tokens.

        Raises:
            UserError: if the prefix leaves no position for an answer.
        """
        self.collator = collator
        self.limit = limit
        self.answer_positions = positions - collator.longest_prefix
        if self.answer_positions < 2:
            raise UserError(
                f"--prompt {shortened(collator.prompt)!r}: picture and prompt take up to {collator.longest_prefix} "
                f"tokens, but the model holds {positions}. Shorten the prompt, or show smaller pictures "
                "(--image-tokens, or the size in the processor's files)"
            )

    def __call__(self, target: dict, size: tuple[int, int] | None = None) -> Measured:
        """Count the tokens of a target, and compare it with what they stand for.

        Args:
            size: width and height of the picture, in pixels.
        """
        ids = self.collator.target_ids(target)
        image_tokens, scale = (0, 1.0) if size is None else self.collator.image_tokens(*size)
        taken = f"the target takes {len(ids)} tokens"
        if self.limit is not None and len(ids) > self.limit:
            return Measured(len(ids), f"{taken}, and --max-target-tokens is {self.limit}; targets are never cut")
        if len(ids) > self.answer_positions:
            return Measured(len(ids), f"{taken}, and the model holds {self.answer_positions} after picture and prompt")
        difference = _difference(self.collator.lead + canonical(target), *self.collator.texts([ids]))
        return Measured(len(ids), None, difference, image_tokens, scale)


def _difference(given: str, learned: str) -> str | None:
    """Return the parts of two texts around their first difference, or None if they are equal."""
    if given == learned:
        return None
    first = next((i for i, (a, b) in enumerate(zip(given, learned)) if a != b), min(len(given), len(learned)))
    start = max(0, first - SHOWN // 2)
    return f"{given[start : start + SHOWN]!r} is learned as {learned[start : start + SHOWN]!r}"


@dataclass(frozen=True)
class TargetLengths:
    """Target tokens of every example by split, EOS included."""

    by_split: dict[str, list[int]]

    @property
    def longest(self) -> int:
        return max(max(lengths, default=0) for lengths in self.by_split.values())

    def summary(self) -> str:
        """Return a line for each split: median, 95th percentile, longest."""
        return "\n".join(
            f"{name:<11}{len(lengths):>6} targets of {np.median(lengths):.0f} tokens (median), "
            f"95 % at most {np.percentile(lengths, 95, method='higher'):.0f}, longest {max(lengths)}"
            for name, lengths in self.by_split.items()
            if lengths
        )

    def longer_than(self, limit: int) -> str:
        """Return "N of M": how many targets are longer than `limit`, of all targets."""
        everything = [length for lengths in self.by_split.values() for length in lengths]
        return f"{sum(length > limit for length in everything)} of {len(everything)}"

    def new_token_limit(self, given: int | None) -> int:
        """Return --max-new-tokens, or an eighth more than the longest target."""
        return given or self.longest + self.longest // 8
