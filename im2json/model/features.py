"""Image features of a frozen tower: worked out once for a run, and read in every step."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from im2json.data.collate import Batch, Collator
from im2json.data.example import Split
from im2json.data.loader import loaded
from im2json.model.memory import Sizes

# N pictures, I image tokens, D hidden size of the language model.
CHUNK = 16  # pictures at a time: always the same, so that a resumed run finds the same numbers


def is_frozen(paligemma: Any) -> bool:
    """Whether training leaves a picture's features as they are."""
    parts = paligemma.model.vision_tower, paligemma.model.multi_modal_projector
    return not any(parameter.requires_grad for part in parts for parameter in part.parameters())


def feature_bytes(paligemma: Any, dtype: torch.dtype) -> int:
    """Of one picture."""
    sizes = Sizes.of(paligemma.config)
    return sizes.image_tokens * sizes.text.hidden * dtype.itemsize


class Features:
    """The features of a split's pictures, N x I x D, in a scratch file that ends with the process, however that ends.

    The file lies where temporary files do (TMPDIR), and the system keeps in memory what has room there.

    Args:
        workers: processes that decode pictures meanwhile.
        shown: whether to show how far it is.

    Raises:
        ValueError: naming the row whose picture is bad.
        OSError: there is no folder for it, or no room.
    """

    def __init__(
        self, split: Split, collator: Collator, paligemma: Any, dtype: torch.dtype, workers: int, shown: bool
    ) -> None:
        self.ids, self.targets = split.ids, split.targets
        self.collator = collator
        start = time.perf_counter()
        chunks = loaded(split, collator.pictures, workers, batch_size=CHUNK)
        with tempfile.TemporaryFile() as file:
            for pixels in tqdm(chunks, "image features", -(-len(split) // CHUNK), leave=False, disable=not shown):
                # Not under no_grad: bitsandbytes on a CPU would repack the 4-bit layers for good.
                found = paligemma.model.get_image_features(pixels.to(paligemma.device)).pooler_output
                file.write(found.to(dtype).cpu().view(torch.uint8).numpy())
            file.flush()
            kept = torch.from_numpy(np.memmap(file, mode="c"))
        self.kept = kept.view(dtype).view(len(split), *found.shape[1:])  # N x I x D
        self.seconds = time.perf_counter() - start

    def batch(self, indices: Sequence[int]) -> Batch:
        """What Collator makes of these examples, with image_features, B x I x D, for pixel_values."""
        ids, targets = [self.ids[i] for i in indices], [self.targets[i] for i in indices]
        return self.collator.batch(ids, targets, image_features=self.kept[torch.tensor(indices)])
