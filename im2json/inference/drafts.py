"""Drafts: what a text will probably go on with, taken from a text that it resembles, and how much of it to try.

Speculative decoding (Leviathan et al. 2023, https://arxiv.org/abs/2211.17192) with greedy choices and no second model,
as in prompt lookup decoding (Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from im2json.model.memory import DRAFTED

# B rows, S tokens of a source.
NOTHING = -1  # where a source holds no token
WEIGHTS = (4, 3, 2, 2, 1, 1, 1, 1)  # of the last tokens, the latest first, where a text is looked for in a source
TAIL = len(WEIGHTS)
LENGTHS = (1, 2, 4, 8, 16, DRAFTED)  # tokens read of each row in a pass


def aligned(source: torch.Tensor, tail: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Return the place in each row's source from which a text that has left it probably goes on; B.

    That is where most of the text's last tokens stand just before. Of equals take the first at or after the expected
    place, or else the nearest before it.

    Args:
        source: B x S, NOTHING where no token is.
        tail: B x TAIL, the last tokens of the text, the latest last; below NOTHING where the text has none yet.
        expected: B, where the text goes on if one token has been substituted.
    """
    places = torch.arange(source.shape[1], device=source.device)
    away = places - expected[:, None]
    likeness = torch.zeros_like(source)
    for back, weight in enumerate(WEIGHTS, start=1):
        before = F.pad(source, (back, 0), value=NOTHING)[:, : source.shape[1]]
        likeness = likeness + weight * (before == tail[:, -back, None])
    likeness = likeness * (source != NOTHING)
    # another number for each place, so that no device has ties to break; the place that has just failed comes last
    steps = torch.where(away < 0, len(places) - away, away).masked_fill(away == -1, 2 * len(places) + 1)
    return (likeness * (4 * len(places)) - steps).argmax(1)


class DraftLength:
    """Chooses how many tokens a pass reads of each row: the last one written and a draft.

    A function of counts alone, so that a run can be repeated to the byte. With one token a row nothing is drafted; how
    often a draft of one would have been right is counted all the same.

    Args:
        overhead: the tokens that take as long as a pass takes besides.
        most: the longest.
    """

    KEPT = 0.9  # of the counts, from pass to pass

    def __init__(self, overhead: int, most: int) -> None:
        self.overhead = overhead
        self.lengths = [length for length in LENGTHS if length <= most]
        self.right, self.tried = 7.0, 8.0

    def observe(self, right: int, tried: int) -> None:
        """Count the draft tokens of a pass that were right, and those tried: in each row up to the first wrong one."""
        self.right = self.KEPT * self.right + right
        self.tried = self.KEPT * self.tried + tried

    def choose(self, rows: int) -> int:
        """Return the length with the most tokens expected per unit of time, for so many rows in a pass."""
        share = self.right / self.tried

        def speed(length: int) -> float:
            return sum(share**place for place in range(length)) / (self.overhead + rows * length)

        return max(self.lengths, key=speed)
