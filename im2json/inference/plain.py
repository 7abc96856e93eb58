"""Answers of an exported model by transformers alone, as anyone would load it; a program that imports none of ours.

python -P plain.py < {"model": FOLDER, "text": TEXT, "pictures": [FILE, ...], "batch_size": N, "causal_prompt": BOOL}
  > ["text", ...]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BatchFeature,
    Idefics3Processor,
)

Inputs = dict[str, torch.Tensor]


@torch.no_grad()
def answers(model: str, text: str, pictures: list[str], batch_size: int, causal_prompt: bool) -> list[str]:
    """Return the greedy answer to each picture, as long as the model's generation_config.json allows.

    Args:
        causal_prompt: whether PaliGemma's prompt attends only to what precedes it.
    """
    encode, tokenizer = load_processor(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded: Any = AutoModelForImageTextToText.from_pretrained(model, dtype="auto")
    loaded.to(device).eval()
    encoded = [encode(Image.open(path).convert("RGB"), text) for path in pictures]
    if causal_prompt:
        for one in encoded:
            one["token_type_ids"] = (one["input_ids"] != loaded.config.image_token_id).long()
    texts: dict[int, str] = {}
    for length in {one["input_ids"].shape[1] for one in encoded}:  # of the same length, so that nothing is padded
        alike = [i for i, one in enumerate(encoded) if one["input_ids"].shape[1] == length]
        for start in range(0, len(alike), batch_size):
            rows = alike[start : start + batch_size]
            inputs = {name: torch.cat([encoded[i][name] for i in rows]) for name in encoded[rows[0]]}
            output = loaded.generate(**BatchFeature(inputs).to(device, loaded.dtype))  # B x (P + T)
            texts |= zip(rows, tokenizer.batch_decode(output[:, length:], skip_special_tokens=True))
    return [texts[i] for i in range(len(pictures))]


def load_processor(model: str) -> tuple[Callable[[Image.Image, str], Inputs], Any]:
    """Return what makes inputs of a picture and a text, and the tokenizer."""
    try:
        processor: Any = AutoProcessor.from_pretrained(model)
    except (ImportError, ValueError) as error:
        if not any(
            package in str(error).lower() for package in ("torchvision", "num2words")
        ):  # which some need for videos
            raise
        kind = AutoConfig.from_pretrained(model).model_type
        if kind.startswith("qwen"):
            return qwen_without_videos(model)
        if kind != "smolvlm":
            raise
        processor = Idefics3Processor.from_pretrained(model)  # which does the same with pictures
    return lambda picture, text: dict(
        processor(images=[picture], text=[text], return_tensors="pt")
    ), processor.tokenizer


def qwen_without_videos(model: str) -> tuple[Callable[[Image.Image, str], Inputs], Any]:
    """Return what Qwen's processor does with a picture and a text."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer, shown, image = (
        AutoTokenizer.from_pretrained(model),
        Qwen2VLImageProcessorPil.from_pretrained(model),
        "<|image_pad|>",
    )

    def encode(picture: Image.Image, text: str) -> Inputs:
        inputs = dict(shown([picture], return_tensors="pt"))
        count = int(inputs["image_grid_thw"].prod()) // shown.merge_size**2
        inputs |= dict(tokenizer([text.replace(image, image * count)], return_tensors="pt"))
        of_picture = inputs["input_ids"] == tokenizer.convert_tokens_to_ids(image)
        return inputs | {"mm_token_type_ids": of_picture.int()}

    return encode, tokenizer


if __name__ == "__main__":
    found = answers(**json.load(sys.stdin))
    assert not any(name.partition(".")[0] == "im2json" for name in sys.modules)
    json.dump(found, sys.stdout)
