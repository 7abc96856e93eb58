"""How well a base reads: the character error rate on receipts that pre-training cannot have drawn."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rapidfuzz.distance import Levenshtein
from transformers import PaliGemmaForConditionalGeneration, PaliGemmaProcessor

from im2json.data.receipts import Receipt, draw_receipt, render
from im2json.pretrain.mixture import OCR_PROMPT

SPLIT, SEED = "test", 20_000_000  # a seed that no one else draws from


@dataclass(frozen=True)
class Reading:
    """A transcription beside what was printed."""

    printed: str
    read: str
    degradation: float
    font: str

    @property
    def errors(self) -> int:
        """Characters to insert, delete or replace."""
        return Levenshtein.distance(self.printed, self.read)


def unseen_receipts(count: int) -> list[Receipt]:
    """The receipts that the published error rates are measured on."""
    return [draw_receipt(SEED, SPLIT, index) for index in range(count)]


@torch.no_grad()
def transcribe(
    model: PaliGemmaForConditionalGeneration,
    processor: PaliGemmaProcessor,
    receipts: list[Receipt],
    prompt: str = OCR_PROMPT,
    batch: int = 250,
    max_new_tokens: int = 400,
) -> list[str]:
    """Greedy answers of the standard classes, on the model's device."""
    texts = []
    for start in range(0, len(receipts), batch):
        images = [render(receipt).image for receipt in receipts[start : start + batch]]
        inputs = processor(images=images, text=["<image>" + prompt] * len(images), return_tensors="pt")
        inputs.pop("labels", None)
        inputs = inputs.to(model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        answers = tokens[:, inputs["input_ids"].shape[1] :].cpu()
        texts += [processor.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
    return texts


def read(
    model: PaliGemmaForConditionalGeneration,
    processor: PaliGemmaProcessor,
    receipts: list[Receipt],
    batch: int = 250,
) -> list[Reading]:
    """Let the model transcribe the receipts."""
    longest = max(len(receipt.text) for receipt in receipts)  # a character is one token or, seldom, a few
    texts = transcribe(model, processor, receipts, batch=batch, max_new_tokens=longest + 16)
    return [
        Reading(receipt.text, text, receipt.style.degradation, receipt.style.font)
        for receipt, text in zip(receipts, texts)
    ]


def error_rate(readings: list[Reading]) -> float:
    """Errors per printed character, over all readings together."""
    return sum(reading.errors for reading in readings) / sum(len(reading.printed) for reading in readings)


def summary(readings: list[Reading]) -> dict[str, float | int | dict[str, float]]:
    """The error rate over all, over the tenth that was degraded most, and by font."""
    worst = sorted(readings, key=lambda reading: reading.degradation)[-max(1, len(readings) // 10) :]
    fonts = sorted({reading.font for reading in readings})
    return {
        "receipts": len(readings),
        "characters": sum(len(reading.printed) for reading in readings),
        "cer": error_rate(readings),
        "cer_worst_tenth": error_rate(worst),
        "read_without_error": sum(reading.errors == 0 for reading in readings) / len(readings),
        "cer_by_font": {font: error_rate([r for r in readings if r.font == font]) for font in fonts},
    }
