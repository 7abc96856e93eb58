"""Attention computed without repeating the keys and values that query heads share."""

from __future__ import annotations

import torch
import torch.nn.functional as F

# B rows, S positions read of each, L positions attended to, H query heads, G key/value heads, E head size.


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


def causal_attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """Compute attention of S positions to themselves and to those before, with a kernel that needs no mask.

    Args:
        query: B x S x H x E.
        keys, values: B x S x G x E.

    Returns:
        B x S x H x E.
    """
    query, keys, values = (part.transpose(1, 2) for part in (query, keys, values))
    out = F.scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


def attention_by_segments(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bounds: torch.Tensor, longest: int, scale: float
) -> torch.Tensor:
    """Compute attention within each of W segments, all in one call.

    Args:
        query, keys, values: N x H x E, one segment after the other.
        bounds: where segments begin, and N; W + 1.
        longest: positions of the longest segment.

    Returns:
        N x H x E.
    """
    places = torch.arange(len(query), device=query.device)
    segment = torch.bucketize(places, bounds[1:], right=True)
    slots = segment * longest + places - bounds[segment]  # N, where each position lies when segments are padded
    count = len(bounds) - 1
    padded = [
        part.new_zeros(count * longest, *part.shape[1:]).index_copy(0, slots, part).unflatten(0, (count, longest))
        for part in (query, keys, values)
    ]
    lengths = bounds.diff()[:, None]
    mask = None if count * longest == len(query) else places[:longest] < lengths  # W x longest
    added = None if mask is None else mask[:, None, None]
    query, keys, values = (part.transpose(1, 2) for part in padded)
    out = F.scaled_dot_product_attention(query, keys, values, attn_mask=added, scale=scale)
    return out.transpose(1, 2).flatten(0, 1).index_select(0, slots)


def tiled(mask: torch.Tensor | None, heads: int) -> torch.Tensor | None:
    """Return a mask, B x S x L, for the queries of `heads` heads, B x (heads * S) x L."""
    if mask is None:
        return None
    return mask[:, None].expand(-1, heads, -1, -1).flatten(1, 2)
