"""Answers of an exported model by transformers alone, as anyone would load it; a program that imports none of ours.

python -P plain.py < {"model": FOLDER, "prompt": TEXT, "pictures": [FILE, ...], "batch_size": N}  > ["text", ...]
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


@torch.no_grad()
def answers(model: str, prompt: str, pictures: list[str], batch_size: int) -> list[str]:
    """The greedy answer to each picture, as long as the model's generation_config.json allows."""
    processor = AutoProcessor.from_pretrained(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    paligemma: Any = AutoModelForImageTextToText.from_pretrained(model, dtype="auto")
    paligemma.to(device).eval()
    texts: list[str] = []
    for start in range(0, len(pictures), batch_size):
        images = [Image.open(path).convert("RGB") for path in pictures[start : start + batch_size]]
        inputs = processor(images=images, text=[f"<image>{prompt}"] * len(images), return_tensors="pt")
        inputs = inputs.to(device, paligemma.dtype)
        output = paligemma.generate(**inputs)  # B x (P + T)
        texts += processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


if __name__ == "__main__":
    found = answers(**json.load(sys.stdin))
    assert not any(name.partition(".")[0] == "im2json" for name in sys.modules)
    json.dump(found, sys.stdout)
