"""The loss on target tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

# B examples, S positions, N label positions of a microbatch, D hidden, V vocabulary.


def summed_loss(model: Any, batch: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy summed over the target tokens of a microbatch, in nats.

    Summed and not averaged: the caller divides once by the target tokens of the whole step, so that any split into
    microbatches and processes gives the same gradient. Logits exist at label positions only: over PaliGemma's
    257,216 words all positions would take gigabytes.

    Args:
        model: a PaliGemmaForConditionalGeneration, with or without LoRA.
        batch: input_ids, attention_mask and token_type_ids (B, S), pixel_values (B, 3, H, W). Without token_type_ids
            the mask is wrong: causal all over, or leaking backwards, by the version of transformers.
        labels: (B, S), -100 where nothing is to be learned.
    """
    paligemma = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = paligemma.model(**batch, use_cache=False).last_hidden_state  # B x S x D
    predicts = labels[:, 1:] != -100  # position s predicts token s + 1
    hidden = hidden[:, :-1][predicts]  # N x D
    logits = paligemma.lm_head(hidden).float()  # N x V
    cap = getattr(paligemma.config.get_text_config(), "final_logit_softcapping", None)
    if cap is not None:  # PaliGemma 2; transformers 5.17 leaves it out
        logits = cap * torch.tanh(logits / cap)
    return F.cross_entropy(logits, labels[:, 1:][predicts], reduction="sum")
