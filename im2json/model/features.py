"""Image features of a frozen tower: worked out once for a run, and read in every step."""

from __future__ import annotations

import math
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import BinaryIO, TypeVar, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from im2json.data.collate import Batch, Collator, Pictures
from im2json.data.example import Split
from im2json.data.loader import loaded
from im2json.options import DECODERS
from im2json.progress import progress_bar

T = TypeVar("T")
# N pictures, I image tokens, D hidden size of the language model.
CHUNK = 16  # pictures at a time: always the same, so that a resumed run finds the same numbers


def is_frozen(model: torch.nn.Module) -> bool:
    """Return whether training leaves the features of a picture as they are: nothing outside the language model
    learns."""
    learning = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
    return all(any(decoder in name for decoder in DECODERS) for name in learning)


class Features:
    """The features of a split's pictures, N x I x D, in a scratch file that ends with the run, however that ends.

    The processes of a machine share the work and the file. It lies where temporary files do (TMPDIR), and the system
    keeps in memory what has room there.

    Args:
        shape: I x D.
        compute: returns the features of B pictures, B x I x D.
        dtype: that they are kept in.
        workers: processes that decode pictures meanwhile, for each of those that train.

    Raises:
        UserError: naming the row whose picture is bad.
        OSError: on all processes, where there is no folder for it, or no room, on one of them.
    """

    def __init__(
        self,
        split: Split,
        collator: Collator,
        shape: tuple[int, int],
        compute: Callable[[Pictures], torch.Tensor],
        dtype: torch.dtype,
        workers: int,
        accelerator: Accelerator,
    ) -> None:
        self.ids, self.targets = split.ids, split.targets
        self.collator = collator
        start, size = time.perf_counter(), math.prod(shape) * dtype.itemsize
        file, rank, processes = _shared_file(accelerator)
        chunks = [range(i, min(i + CHUNK, len(split))) for i in range(0, len(split), CHUNK)][rank::processes]

        def write() -> None:
            pictures = loaded(split, collator.pictures_of, workers, batch_sampler=chunks)
            with progress_bar(len(chunks), "image features", "batch", shown=rank == 0, keep=False) as bar:
                for chunk, shown in zip(chunks, pictures, strict=True):
                    # Not under no_grad: bitsandbytes on a CPU would repack the 4-bit layers for good.
                    found = compute({name: value.to(accelerator.device) for name, value in shown.items()})
                    file.seek(chunk.start * size)
                    file.write(found.to(dtype).cpu().view(torch.uint8).numpy().data)
                    bar.update()
            file.flush()

        with file:
            _on_all(write)
            kept = torch.from_numpy(_on_all(lambda: np.memmap(file, mode="c")))
        self.kept = kept.view(dtype).view(len(split), *shape)
        self.seconds = time.perf_counter() - start

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return the batch of these examples that Collator makes, with image_features, B x I x D, for the pictures."""
        ids, targets = [self.ids[i] for i in indices], [self.targets[i] for i in indices]
        return self.collator.batch(ids, targets, {"image_features": self.kept[torch.tensor(indices)]})


def _shared_file(accelerator: Accelerator) -> tuple[BinaryIO, int, int]:
    """Open a file without a name, shared by this machine's processes.

    Returns:
        The file, this process's index among them, and their number.

    Raises:
        OSError: on all processes, where one of them cannot open it.
    """
    machines = gather_object([platform.node()])
    here = [index for index, machine in enumerate(machines) if machine == machines[accelerator.process_index]]
    rank = here.index(accelerator.process_index)
    own = _on_all(lambda: None if rank else tempfile.NamedTemporaryFile())  # noqa: SIM115
    names = gather_object([own and own.name])
    file = _on_all(lambda: open(names[here[0]], "r+b"))  # noqa: SIM115
    if own is not None:
        own.close()  # which takes the name away
    return file, rank, len(here)


def _on_all(call: Callable[[], T]) -> T:
    """Return what `call` returns on this process, once all have called it.

    Raises:
        OSError: that of any process.
    """
    try:
        result, failure = call(), None
    except OSError as error:  # not kept itself: with its traceback it would hold on to what was under way
        result, failure = None, error.args
    for other in gather_object([failure]):
        if other is not None:
            raise OSError(*other)
    return cast(T, result)
