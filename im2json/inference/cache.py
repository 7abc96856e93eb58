"""The keys and values of texts that are being written, and who attends to whom."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from im2json.families import Reader

# R slots, B rows that are read, S positions read of each, L positions of a slot, G key/value heads, E head size.


class KeyValues:
    """The keys and values of all layers. A slot holds one text; it has L positions.

    The tensors never move, so that a CUDA graph can be replayed on them.

    Args:
        reader: whose keys and values they are.
        slots: R.
        length: L.
    """

    def __init__(self, reader: Reader, slots: int, length: int) -> None:
        shape, like = (slots, length, reader.kv_heads, reader.head_dim), reader.like
        # zeros, as a position that is not written yet is multiplied by 0, and 0 times a NaN would be NaN
        self.layers = [(like.new_zeros(shape), like.new_zeros(shape)) for _ in range(reader.layers)]  # R x L x G x E
        self.length = length

    @staticmethod
    def slot_bytes(reader: Reader, length: int) -> int:
        """Return what a slot of so many positions takes."""
        return 2 * reader.layers * reader.kv_heads * reader.head_dim * reader.like.itemsize * length

    def move(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copy what some slots hold to as many others."""
        for layer in self.layers:
            for kept in layer:
                kept.index_copy_(0, targets, kept.index_select(0, sources))


class PrefixCache:
    """Keep the keys and values of prefixes that are being read. Each fills a slot from its beginning.

    All of a prefix attends to all of it, unless `look_back` is called before.

    Args:
        slots: B indices. A slot may be named several times if its rows are the same.
    """

    def __init__(self, kept: KeyValues, slots: torch.Tensor) -> None:
        self.kept = kept
        self.slots = slots
        self.lengths: torch.Tensor | None = None
        self.width = 0
        self.together: torch.Tensor | None = None

    def look_back(self, lengths: torch.Tensor, width: int, together: torch.Tensor | None = None) -> None:
        """Let each position attend to itself and to those before it, in rows that are padded on the right.

        Args:
            lengths: B, the positions that are real.
            width: S, those and the padding.
            together: B x S, bool, the positions of a row that attend to each other as well.
        """
        self.lengths, self.width, self.together = lengths, width, together

    @property
    def causal(self) -> bool:
        """Return whether a position attends only to itself and to those before it."""
        return self.lengths is not None and self.together is None

    def update(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep what is new, B x S x G x E, clear the rest of the slots, and return what to attend to."""
        rest = (0, 0, 0, 0, 0, self.kept.length - keys.shape[1])
        for kept, new in zip(self.kept.layers[layer], (keys, values)):
            whole = F.pad(self._real(new), rest)  # what another text left may have overflowed
            # 8 bytes at a time: index_copy_ computes an index per element
            kept.view(torch.int64).index_copy_(0, self.slots, whole.view(torch.int64))
        return keys, values

    def mask(self, window: int | None) -> torch.Tensor | None:
        """Return what is added to scores, 1 or B x S x S, or None if nothing is hidden but what `causal` says.

        Args:
            window: how many positions a layer sees if it looks back, the token's own included. None: all.
        """
        if self.lengths is None or (window is None and self.together is None):
            return None
        places = torch.arange(self.width, device=self.lengths.device)
        back = (places[:, None] - places)[None]
        hidden = back < 0
        if self.together is not None:
            hidden = hidden & ~(self.together[:, :, None] & self.together[:, None, :])
        return _added(hidden if window is None else hidden | (back >= window), self.kept)

    def _real(self, new: torch.Tensor) -> torch.Tensor:
        """Return B x S x G x E with zeros where a row is padded."""
        if self.lengths is None:
            return new
        padded = torch.arange(new.shape[1], device=new.device) >= self.lengths[:, None]
        return new.masked_fill(padded[:, :, None, None], 0)


@dataclass(frozen=True)
class TokenCache:
    """Keep the keys and values of the next S tokens of the first B slots, and show each token what it attends to.

    That is all that its slot holds up to its own position.
    """

    kept: KeyValues
    places: torch.Tensor  # B x S, positions in the slots
    end: int  # no token stands at this position or beyond
    begins: torch.Tensor  # B, where windows begin to hold: with the answers, if all of a prefix sees all of it
    causal = False  # the masks say it all

    def update(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep what is new, B x S x G x E, and return what to attend to, B x `end` x G x E."""
        rows = torch.arange(len(self.places), device=self.places.device)[:, None]
        flat = (rows * self.kept.length + self.places).flatten()
        for kept, new in zip(self.kept.layers[layer], (keys, values)):
            kept.flatten(0, 1).index_copy_(0, flat, new.flatten(0, 1))
        kept_keys, kept_values = self.kept.layers[layer]
        return kept_keys[: len(rows), : self.end], kept_values[: len(rows), : self.end]

    def mask(self, window: int | None) -> torch.Tensor:
        """Return what is added to scores, B x S x `end`: minus infinity where a token does not look.

        Args:
            window: how many positions a layer sees, the token's own included. None: all.
        """
        back = self.places[:, :, None] - torch.arange(self.end, device=self.places.device)
        hidden = back < 0
        if window is not None:
            hidden = hidden | ((back >= window) & (self.places >= self.begins[:, None])[:, :, None])
        return _added(hidden, self.kept)


def _added(hidden: torch.Tensor, kept: KeyValues) -> torch.Tensor:
    """Return what is added to scores: minus infinity where `hidden`. Booleans would be converted in every layer."""
    return kept.layers[0][0].new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
