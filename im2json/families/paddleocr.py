"""PaddleOCR-VL, a small reader of documents: a tower of SigLIP's layers, all else as in Qwen2.5-VL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import (
    PaddleOCRVLImageProcessorPil,
    smart_resize,
)

from im2json.data.collate import Pictures
from im2json.families.base import own_head
from im2json.families.chat import Seen
from im2json.families.qwen import IMAGE_TOKENS, Qwen, QwenCollator, QwenProcessor, pixel_values
from im2json.model.memory import Sizes, Tower
from im2json.options import Trim

# I image tokens, D hidden.


class PaddleOCRProcessor(QwenProcessor):
    """Scales a picture as Qwen's does, between limits of its own."""

    image_processor_class = PaddleOCRVLImageProcessorPil


class PaddleOCR(Qwen):
    """PaddleOCR-VL."""

    model_types: Sequence[str] = ("paddleocr_vl",)
    text_types: Sequence[str] = ("paddleocr_vl_text",)
    processor_class = PaddleOCRProcessor
    token = "<|IMAGE_PLACEHOLDER|>"
    hub_names: ClassVar[Mapping[str, str]] = {
        "model.language_model.": "model.", "model.visual.": "visual.", "model.projector.": "mlp_AR.",
    }  # fmt: skip

    @property
    def collator_class(self) -> type[QwenCollator]:
        """Return what lays out examples."""
        return PaddleOCRCollator

    def look(self, model: Any, pictures: Pictures) -> Seen:
        """Return what the decoder gets of B pictures."""
        size = model.config.vision_config.patch_size
        pixels = pixel_values(pictures, 1, model.dtype).unflatten(1, (3, size, size))
        return Seen(torch.cat(model.model.get_image_features(pixels, pictures["image_grid_thw"]).pooler_output))

    def sizes(self, config: Any, image_tokens: int | None = None) -> Sizes:
        """Return the sizes of a config, for a picture of as many tokens as it may take."""
        text, vision = config.get_text_config(), config.vision_config
        d = vision.hidden_size
        encoder = Tower.of_siglip(vision)
        merged = vision.spatial_merge_size**2
        other = d * (3 * vision.patch_size**2 + (vision.image_size // vision.patch_size) ** 2) + own_head(config)
        projector = d * merged * (d * merged + text.hidden_size)
        seen = (image_tokens or IMAGE_TOKENS) * merged
        return Sizes(Tower.of_decoder(text, causal=True), encoder, text.vocab_size, seen, projector, other)


class PaddleOCRCollator(QwenCollator):
    """Hands pictures over as patches, row by row."""

    placeholder = token = PaddleOCR.token
    scaled = staticmethod(smart_resize)

    def __init__(self, processor: PaddleOCRProcessor, prompt: str, trim: Trim = "off") -> None:
        super().__init__(processor, prompt, trim)
        self.block = 1
