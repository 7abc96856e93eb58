"""Greedy generation in batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from transformers import PaliGemmaForConditionalGeneration

from im2json.data.collate import Collator


@torch.no_grad()
def generate(
    model: PaliGemmaForConditionalGeneration,
    collator: Collator,
    images: Sequence[Image.Image],
    max_new_tokens: int,
) -> list[str]:
    """The most likely text for each picture, token by token, until EOS or `max_new_tokens`.

    Args:
        model: plain weights, in eval mode (see model.lora.merged_copy).
    """
    device, dtype = model.device, model.dtype
    inputs = {name: value.to(device) for name, value in collator.prefixes(images).items()}
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    tokenizer = collator.processor.tokenizer
    output = model.generate(  # B x (P + T)
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    answers = output[:, inputs["input_ids"].shape[1] :]  # B x T
    return tokenizer.batch_decode(answers, skip_special_tokens=True, clean_up_tokenization_spaces=False)
