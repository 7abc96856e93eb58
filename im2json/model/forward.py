"""PaliGemma over a microbatch, as transformers computes it, with nothing in it that waits for the GPU."""

from __future__ import annotations

from typing import Any

import torch

# B examples, S positions, I image tokens, D hidden.


def hidden_states(paligemma: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The last hidden states of pictures, prompts and targets; B x S x D.

    transformers looks for the image tokens and compares counts on the GPU, at the cost of a synchronisation; here they
    are known to stand in front (see Collator), and the rest follows. Everything is queued at once.

    Args:
        batch: input_ids, attention_mask and token_type_ids (B, S), padded on the right; pixel_values (B, 3, H, W), or
            image_features (B, I, D) as they are worked out from those.
    """
    model = paligemma.model
    pictures = batch.get("image_features")  # B x I x D
    if pictures is None:
        pictures = model.get_image_features(batch["pixel_values"]).pooler_output
    words = model.get_input_embeddings()(batch["input_ids"][:, pictures.shape[1] :])  # B x (S - I) x D
    positions = torch.arange(1, batch["input_ids"].shape[1] + 1, device=words.device)  # S: PaliGemma counts from 1
    config = paligemma.config.get_text_config()
    mask = prefix_mask(batch["attention_mask"], batch["token_type_ids"], getattr(config, "sliding_window", None))
    if config._attn_implementation == "eager":
        mask = _added(mask, words.dtype)
    return model.language_model(
        inputs_embeds=torch.cat([pictures.to(words.dtype), words], dim=1),
        attention_mask=mask,
        position_ids=positions[None],
        use_cache=False,
    ).last_hidden_state


def prefix_mask(
    attention_mask: torch.Tensor, token_type_ids: torch.Tensor, window: int | None
) -> torch.Tensor | dict[str, torch.Tensor]:
    """Who attends to whom, B x 1 x S x S: all to the prefix, in both directions within it, the suffix causally, nobody
    to padding. For a model with sliding windows, a mask for each kind of layer.
    """
    steps = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    back = (steps[:, None] - steps[None, :])[None, None]  # 1 x 1 x S x S
    in_prefix = token_type_ids == 0  # B x S
    within = in_prefix[:, None, :, None] & in_prefix[:, None, None, :]  # B x 1 x S x S
    real = attention_mask.bool()[:, None, None, :]  # B x 1 x 1 x S
    full = real & (within | (back >= 0))  # B x 1 x S x S
    if window is None:
        return full
    return {"full_attention": full, "sliding_attention": real & (within | (back >= 0) & (back < window))}


def _added(mask: torch.Tensor | dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor | dict[str, torch.Tensor]:
    """The mask as it is added to scores."""
    if isinstance(mask, dict):
        return {kind: _added(each, dtype) for kind, each in mask.items()}  # type: ignore[misc]
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
