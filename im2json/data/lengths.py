"""How long the targets are in tokens: counted before the first step, so that none is ever cut in silence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from im2json.data.collate import Collator
from im2json.data.example import Split
from im2json.errors import UserError


@dataclass(frozen=True)
class TargetLengths:
    """Target tokens of every example by split, EOS included."""

    by_split: dict[str, list[int]]

    @classmethod
    def count(cls, splits: Mapping[str, Split], collator: Collator) -> TargetLengths:
        return cls({
            name: [len(collator.target_ids(target)) for target in split.targets] for name, split in splits.items()
        })  # fmt: skip

    @property
    def longest(self) -> int:
        return max(max(lengths, default=0) for lengths in self.by_split.values())

    def summary(self) -> str:
        """Return a line for each split: median, 95th percentile, longest."""
        return "\n".join(
            f"{name:<11}{len(lengths):>6} targets of {np.median(lengths):.0f} tokens (median), "
            f"95 % at most {np.percentile(lengths, 95, method='higher'):.0f}, longest {max(lengths)}"
            for name, lengths in self.by_split.items()
        )

    def longer_than(self, limit: int) -> str:
        """Return "N of M": how many targets are longer than `limit`, of all targets."""
        everything = [length for lengths in self.by_split.values() for length in lengths]
        return f"{sum(length > limit for length in everything)} of {len(everything)}"

    def check(self, limit: int | None, prefix: int, positions: int) -> None:
        """Refuse targets that would not fit.

        Args:
            limit: --max-target-tokens.
            prefix: positions that picture and prompt take.
            positions: how many the model has.

        Raises:
            UserError: naming how many targets are too long, and the length needed.
        """
        if limit is not None and self.longest > limit:
            raise UserError(
                f"--max-target-tokens {limit} would cut {self.longer_than(limit)} targets, which are never cut: "
                f"the longest needs {self.longest}; raise the limit or leave those rows out"
            )
        if prefix + self.longest > positions:
            cut = self.longer_than(positions - prefix)
            raise UserError(
                f"{cut} targets are longer than the model can hold: {prefix} positions of picture and prompt and "
                f"{self.longest} of the longest target exceed its {positions}; leave those rows out"
            )

    def new_token_limit(self, given: int | None) -> int:
        """Return --max-new-tokens, or an eighth more than the longest target."""
        return given or self.longest + self.longest // 8
