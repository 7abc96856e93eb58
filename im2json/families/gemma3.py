"""Gemma 3, which sees every picture as one square of 256 tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from im2json.data.collate import Collator, Pictures
from im2json.families.base import PictureFeatures, Squares, own_head
from im2json.families.chat import (
    ChatCollator,
    ChatFamily,
    ChatProcessor,
    ChatReader,
    Grid,
    Seen,
    normalised,
    refuse_in_chat,
)
from im2json.families.paligemma import PaliGemma
from im2json.model.memory import Sizes, Tower
from im2json.options import DataOptions, Trim

# B examples, S positions, P prefix positions, I image tokens, D hidden.


class Gemma3Processor(ChatProcessor):
    """Squashes a picture to the square that the tower sees. Crops of long pictures (pan and scan) are not made."""

    image_processor_class = Gemma3ImageProcessorPil
    sizes = frozenset({"height", "width"})


class Gemma3(ChatFamily):
    """Gemma 3 of 4B and more.

    The tokens of a picture attend to each other. All other tokens attend to those before them, in most layers only
    within a window.
    """

    model_types: Sequence[str] = ("gemma3",)
    text_types: Sequence[str] = ("gemma3_text",)
    tower = "vision_tower"
    processor_class = Gemma3Processor
    token = "<image_soft_token>"
    hub_names = PaliGemma.hub_names

    def features_of_a_picture(self, config: Any) -> int:
        """Return how many features every picture has."""
        return config.mm_tokens_per_image

    def needed(self, config: Any, processor: Any) -> dict[str, tuple[Any, Any]]:
        """Return settings of the processor and what they must be; see ChatFamily."""
        size, side = processor.image_processor.size, config.vision_config.image_size
        return {"size": ((size["height"], size["width"]), (side, side))}

    def collator(self, processor: Any, options: DataOptions) -> Collator:
        """Return the collator.

        Raises:
            UserError: if prompt or template cannot be used, or a number of image tokens is asked for.
        """
        tokens = f"every picture takes {processor.features} image tokens with this model"
        refuse_in_chat(options, image_tokens=tokens)
        return Gemma3Collator(processor, options.prompt, options.trim, options.letterbox)

    def look(self, model: Any, pictures: Pictures) -> Seen:
        """Return what the decoder gets of B pictures."""
        pixels = normalised(pictures["levels"], pictures["pixels"]).to(model.model.vision_tower.dtype)
        return Seen(model.model.get_image_features(pixels).pooler_output)

    def arguments(
        self, model: Any, inputs: Mapping[str, torch.Tensor], of_picture: torch.Tensor, seen: Seen
    ) -> dict[str, Any]:
        """Return the decoder's masks, see ChatFamily."""
        steps = torch.arange(of_picture.shape[1], device=of_picture.device)
        back = steps[:, None] - steps  # S x S
        full = (back >= 0) | (of_picture[:, None, :, None] & of_picture[:, None, None, :])  # B x 1 x S x S
        window = model.config.get_text_config().sliding_window
        return {"attention_mask": {"full_attention": full, "sliding_attention": full & (back < window)}}

    def features(self, model: Any) -> PictureFeatures:
        """Return how the features of pictures are computed."""
        shape = model.config.mm_tokens_per_image, model.config.get_text_config().hidden_size
        return PictureFeatures(shape, lambda pictures: self.look(model, pictures).features)

    def reader(self, model: Any, collator: Collator) -> Gemma3Reader:
        """Return what reads prefixes and tokens with a model of plain weights."""
        assert isinstance(collator, Gemma3Collator)
        return Gemma3Reader(model, collator, self.look)

    def sizes(self, config: Any, image_tokens: int | None = None) -> Sizes:
        """Return the sizes of a config."""
        text, vision = config.get_text_config(), config.vision_config
        d = vision.hidden_size
        encoder = Tower.of_siglip(vision)
        patches = (vision.image_size // vision.patch_size) ** 2
        other = d * (3 * vision.patch_size**2 + patches + text.hidden_size)  # the projector is no linear layer
        other += own_head(config)
        return Sizes(Tower.of_decoder(text, norms=4, head_norms=True), encoder, text.vocab_size, patches, 0, other)


class Gemma3Collator(Squares, ChatCollator):
    """Hands pictures over as squares of bytes."""

    placeholder, token = "<start_of_image>", Gemma3.token
    largest = ()

    def __init__(self, processor: Gemma3Processor, prompt: str, trim: Trim = "off", letterbox: bool = False) -> None:
        super().__init__(processor, prompt, trim)
        self.described = self.to_squares(processor, letterbox)

    def expansion(self, grid: Grid) -> str:
        """Return the picture's tokens between two that say where it begins and ends."""
        return f"\n\n{self.placeholder}{self.token * self.processor.features}<end_of_image>\n\n"

    def grids(self, pictures: Mapping[str, torch.Tensor]) -> list[Grid]:
        """Return nothing for each of B pictures, as all take equally many tokens."""
        return [()] * len(next(iter(pictures.values())))

    def image_tokens(self, width: int, height: int) -> tuple[int, float]:
        """Return the tokens that every picture takes, and the scale that this one is seen in."""
        return self.processor.features, self.scale(width, height)

    def pictures(self, images: Sequence[Image.Image]) -> Pictures:
        """Return {"pixels": B x 3 x H x W in bytes, "levels": B x 2 x 3}."""
        shown = self.processor.image_processor
        found = shown(
            [*map(self.shown, images)], do_resize=True, do_pan_and_scan=False, do_rescale=False, do_normalize=False,
            return_tensors="pt",
        )  # fmt: skip
        return {"pixels": found["pixel_values"].to(torch.uint8), "levels": self.levels(len(images))}

    def seen(self, pictures: Pictures) -> Image.Image:
        """Return the picture in the square that the tower sees."""
        return Image.fromarray(pictures["pixels"][0].permute(1, 2, 0).numpy())


class Gemma3Reader(ChatReader):
    """Reads prefixes in which the tokens of a picture attend to each other."""

    def look_back(self, cache: Any, lengths: torch.Tensor, of_picture: torch.Tensor) -> None:
        """Say who attends to whom; see ChatReader."""
        cache.look_back(lengths, of_picture.shape[1], together=of_picture)

    def rotary(self, hidden: torch.Tensor, rotations: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines, which differ between layers with and without a window; B x S x E each."""
        return self.text.rotary_emb(hidden, rotations, kind)
