"""What one new token attends to: keys and values that stay where they are, and attention that does not repeat them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

# B rows, H query heads, K key/value heads, S new positions, L cached positions, E head size.
NAME = "im2json_grouped"


class KeyValues:
    """The keys and values of all layers, for as long as a batch is decoded.

    Stands in for transformers' Cache, of which a language model only calls `update`. Its tensors never move and the
    place to write at is itself a tensor, so a CUDA graph that was captured once can be replayed for every token.

    Args:
        whole: whether `update` hands out all L positions, to be attended to under a mask: shapes stay the same, which
            a CUDA graph needs. Otherwise it hands out the first `filled`, which a CPU is quicker with.
    """

    is_initialized = False  # what is put in first is the prefix

    def __init__(self, config: Any, rows: int, length: int, whole: bool, like: torch.Tensor) -> None:
        shape = (rows, config.num_key_value_heads, length, config.head_dim)
        self.layers = [  # keys and values, B x K x L x E; zeros, since 0 times a masked NaN is NaN
            (like.new_zeros(shape), like.new_zeros(shape)) for _ in range(config.num_hidden_layers)
        ]
        self.whole = whole
        self.filled = 0  # positions, known to the host; follows the device when not `whole`
        self.position = torch.zeros(1, dtype=torch.long, device=like.device)  # where the next token is written

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep what is new, B x K x S x E; the keys and values to attend to. What else is handed in is for others.

        More than one position is a prefix: it attends to itself alone. It may have fewer rows than there is room for.
        """
        rows, _, positions, _ = keys.shape
        if positions > 1:
            for kept, new in zip(self.layers[layer], (keys, values)):
                kept[:rows, :, :positions] = new
                if self.whole:
                    kept[:, :, positions:] = 0  # what another batch left, which may have overflowed
            return keys, values
        for kept, new in zip(self.layers[layer], (keys, values)):
            kept.index_copy_(2, self.position, new)
        kept_keys, kept_values = self.layers[layer]
        end = kept_keys.shape[2] if self.whole else self.filled
        return kept_keys[:, :, :end], kept_values[:, :, :end]

    def mask(self) -> torch.Tensor | None:
        """Added to the scores so that only what was written is attended to, 1 x 1 x 1 x L."""
        if not self.whole:
            return None
        keys = self.layers[0][0]
        places = torch.arange(keys.shape[2], device=keys.device)
        # Added and not boolean: attention would convert that in every layer.
        return keys.new_zeros(places.shape).masked_fill(places > self.position, float("-inf"))[None, None, None]

    def keep(self, rows: torch.Tensor) -> None:
        """Leave out all other rows."""
        self.layers = [(keys[rows], values[rows]) for keys, values in self.layers]


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Attention in which all of a row's queries see the same keys: a whole prefix, or one new token.

    Then the query heads that share a key/value head can be laid out as further queries of it. The usual way repeats
    keys and values once a query head, which with PaliGemma's 8 to 1 costs more memory traffic than the weights.

    Args:
        query: B x H x S x E.
        key, value: B x K x L x E.
        attention_mask: added to the scores, 1 x 1 x 1 x L, or None.

    Returns:
        B x S x H x E, and None for the weights.
    """
    rows, heads, positions, size = query.shape
    grouped = query.reshape(rows, key.shape[1], -1, size)  # B x K x (H / K * S) x E
    if softcap is None:
        out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    else:  # Gemma 2
        scores = grouped @ key.transpose(2, 3) * (size**-0.5 if scaling is None else scaling)
        scores = torch.tanh(scores / softcap) * softcap  # B x K x (H / K * S) x L
        if attention_mask is not None:
            scores = scores + attention_mask
        out = scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value
    return out.view(rows, heads, positions, size).transpose(1, 2).contiguous(), None


# No mask function is registered with it, so where transformers would build a causal mask it leaves it at the one that
# it is given: none for the prefix, which attends in both directions throughout.
AttentionInterface.register(NAME, grouped_attention)


@contextmanager
def grouped(config: Any) -> Iterator[None]:
    """A text model of this config attends with grouped_attention while this lasts."""
    usual = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = usual
