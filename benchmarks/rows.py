"""Rows of CORD's lengths, for benchmarks with random weights: pictures of noise, targets of 40 to 400 tokens."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from im2json.data.example import Example

OVERHEAD = 9  # tokens of {"a":""} and EOS, a byte each


class Rows:
    """A split of such rows. `tokens`: the target tokens of each, EOS included."""

    def __init__(self, count: int, size: tuple[int, int], seed: int = 0) -> None:
        drawn = random.Random(seed)
        self.name = "train"
        self.size = size  # of the pictures: width and height in pixels
        self.tokens = [min(400, max(40, int(drawn.lognormvariate(math.log(160), 0.5)))) for _ in range(count)]
        self.ids: Sequence[str] = [str(i) for i in range(count)]
        self.targets: list[dict[str, Any]] = [
            {"a": "".join(drawn.choices("0123456789", k=length - OVERHEAD))} for length in self.tokens
        ]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> Example:
        width, height = self.size
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        return Example(self.ids[i], Image.fromarray(pixels), self.targets[i])
