"""The keys and values of texts that are being written, and attention to them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

# R slots, B rows that are read, S positions read of each, L positions of a slot, H query heads, G key/value heads,
# E head size.


class KeyValues:
    """The keys and values of all layers. A slot holds one text; it has L positions.

    The tensors never move, so that a CUDA graph can be replayed on them.

    Args:
        like: a tensor of the dtype and device wanted.
    """

    def __init__(self, layers: int, heads: int, size: int, slots: int, length: int, like: torch.Tensor) -> None:
        shape = (slots, length, heads, size)
        # zeros, as a position that is not written yet is multiplied by 0, and 0 times a NaN would be NaN
        self.layers = [(like.new_zeros(shape), like.new_zeros(shape)) for _ in range(layers)]  # R x L x G x E
        self.length = length

    def move(self, source: int, target: int) -> None:
        """Copy what one slot holds to another."""
        for layer in self.layers:
            for kept in layer:
                kept[target] = kept[source]


class PrefixCache:
    """Keep the keys and values of prefixes that are being read. Each fills a slot from its beginning.

    Args:
        slots: B indices. One may stand there several times if its rows are the same.
    """

    def __init__(self, kept: KeyValues, slots: torch.Tensor) -> None:
        self.kept = kept
        self.slots = slots

    def update(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep what is new, B x S x G x E, clear the rest of the slots, and return what to attend to."""
        rest = (0, 0, 0, 0, 0, self.kept.length - keys.shape[1])
        for kept, new in zip(self.kept.layers[layer], (keys, values)):
            whole = F.pad(new, rest)  # what another text left may have overflowed
            # 8 bytes at a time: index_copy_ computes an index per element
            kept.view(torch.int64).index_copy_(0, self.slots, whole.view(torch.int64))
        return keys, values

    def mask(self, window: int | None) -> None:
        """Return no mask: all of a prefix attends to all of it."""


@dataclass(frozen=True)
class TokenCache:
    """Keep the keys and values of the next S tokens of the first B slots, and show each token what it attends to.

    That is all that its slot holds up to its own position.
    """

    kept: KeyValues
    places: torch.Tensor  # B x S, positions in the slots
    end: int  # no token stands at this position or beyond
    begins: torch.Tensor  # B, where the answers begin

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
        if window is not None:  # a prefix attends to all of itself in every layer
            hidden = hidden | ((back >= window) & (self.places >= self.begins[:, None])[:, :, None])
        # Added and not boolean: attention would convert that in every layer.
        return self.kept.layers[0][0].new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))


def grouped_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """Compute attention without repeating the keys and values that query heads share.

    The query heads of one key/value head are laid out as further queries of it. Repeating keys and values instead
    would cost more memory traffic than the weights where 8 heads share one, as in PaliGemma.

    Args:
        query: B x S x H x E.
        keys, values: B x L x G x E.
        mask: added to the scores, B x (H / G * S) x L in the order of `tiled`, or None.
        softcap: Gemma 2's cap on the scores.

    Returns:
        B x S x H x E.
    """
    rows, positions, _, size = query.shape
    groups = keys.shape[2]
    grouped = query.view(rows, positions, groups, -1, size).permute(0, 2, 3, 1, 4).flatten(2, 3)  # B x G x (H/G S) x E
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    added = None if mask is None else mask[:, None]
    if softcap is None:
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=added, scale=scale)
    else:
        scores = torch.tanh(grouped @ keys.transpose(2, 3) * (scale / softcap)) * softcap
        if added is not None:
            scores = scores + added
        out = scores.softmax(-1, dtype=torch.float32).to(values.dtype) @ values
    return out.view(rows, groups, -1, positions, size).permute(0, 3, 1, 2, 4).reshape(query.shape)


def tiled(mask: torch.Tensor | None, heads: int) -> torch.Tensor | None:
    """Return a mask, B x S x L, for the queries of `heads` heads, B x (heads * S) x L."""
    if mask is None:
        return None
    return mask[:, None].expand(-1, heads, -1, -1).flatten(1, 2)
