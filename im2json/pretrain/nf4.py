"""NF4 in plain torch, so that pre-training can get used to the rounding that QLoRA puts the base through.

The values are those of Dettmers et al. 2023 (QLoRA, appendix E): blocks of 64 weights, scaled by their largest one.
The second quantisation, of the scales, is left out: it moves a weight little.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

BLOCK = 64
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def round_to_nf4(weights: Tensor) -> Tensor:
    """`weights`, flat and a multiple of BLOCK long, each replaced by the nearest value that NF4 can hold."""
    assert weights.dim() == 1 and weights.numel() % BLOCK == 0
    levels = torch.tensor(LEVELS, dtype=weights.dtype, device=weights.device)
    blocks = weights.view(-1, BLOCK)  # N x BLOCK
    scales = blocks.abs().amax(dim=1, keepdim=True).clamp_min(1e-12)  # N x 1
    nearest = torch.bucketize(blocks / scales, (levels[1:] + levels[:-1]) / 2)
    return (levels[nearest] * scales).view(-1)


@contextmanager
def rounded(weights: list[Tensor]) -> Iterator[None]:
    """The weights rounded to NF4 within the block and as they were after it: gradients pass straight through."""
    with torch.no_grad():
        kept = torch.cat([weight.reshape(-1) for weight in weights])
        _copy_back(weights, round_to_nf4(kept))
    try:
        yield
    finally:
        with torch.no_grad():
            _copy_back(weights, kept)


def _copy_back(weights: list[Tensor], flat: Tensor) -> None:
    pieces = flat.split([weight.numel() for weight in weights])
    torch._foreach_copy_(weights, [piece.view_as(weight) for piece, weight in zip(pieces, weights)])
