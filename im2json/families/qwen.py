"""Qwen2.5-VL and Qwen3-VL, which read pictures in their own shape."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import AttentionInterface
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from im2json.data.collate import Collator, Pictures
from im2json.families.base import Cache, own_head
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
from im2json.model.attention import attention_by_segments
from im2json.model.memory import Sizes, Tower
from im2json.options import DataOptions, Trim

# B examples, S positions, P prefix positions, N patches of a picture at most, I image tokens, D hidden, E head size.
IMAGE_TOKENS = 1024
"""The most that a picture takes unless --image-tokens says otherwise: about 1,000 x 1,000 pixels with Qwen3-VL."""
NARROWEST = 32
"""A picture that is longer than so many times its width is widened with white: models refuse the narrowest."""


class QwenProcessor(ChatProcessor):
    """Scales a picture to a number of pixels between two limits, whatever its shape."""

    image_processor_class: ClassVar[Any] = Qwen2VLImageProcessorPil
    sizes = frozenset({"shortest_edge", "longest_edge"})

    def limit(self, image_tokens: int) -> None:
        """Scale pictures down to so many image tokens."""
        shown = self.image_processor
        most = image_tokens * (shown.patch_size * shown.merge_size) ** 2
        # Pixels of the whole picture, whatever these names say. Sides are rounded up to reach the least, which must not
        # lead beyond the most.
        shown.size = {"shortest_edge": min(shown.size["shortest_edge"], most // 4), "longest_edge": most}


class Qwen(ChatFamily):
    """Qwen3-VL, whose decoder gets features in several layers (DeepStack)."""

    model_types: Sequence[str] = ("qwen3_vl",)
    text_types: Sequence[str] = ("qwen3_vl_text",)
    tower = "visual"  # which waits for the GPU to know how large pictures are
    processor_class: ClassVar[Any] = QwenProcessor
    token = "<|image_pad|>"

    @property
    def collator_class(self) -> type[QwenCollator]:
        """Return what lays out examples."""
        return QwenCollator

    def needed(self, config: Any, processor: Any) -> dict[str, tuple[Any, Any]]:
        """Return settings of the processor and what they must be; see ChatFamily."""
        shown, vision = processor.image_processor, config.vision_config
        return {
            "patch_size": (shown.patch_size, vision.patch_size),
            "merge_size": (shown.merge_size, vision.spatial_merge_size),
            "temporal_patch_size": (shown.temporal_patch_size, getattr(vision, "temporal_patch_size", 1)),
        }

    def collator(self, processor: Any, options: DataOptions) -> Collator:
        """Return the collator.

        Raises:
            UserError: if prompt or template cannot be used, or `letterbox` is asked for.
        """
        refuse_in_chat(options, letterbox="this model sees pictures in their own shape")
        processor.limit(options.image_tokens or IMAGE_TOKENS)
        return self.collator_class(processor, options.prompt, options.trim)

    def look(self, model: Any, pictures: Pictures) -> Seen:
        """Return what the decoder gets of B pictures, for several of its layers if it wants that (DeepStack,
        https://arxiv.org/abs/2406.04334)."""
        tower = model.model.visual
        pixels = pixel_values(pictures, tower.config.temporal_patch_size, tower.dtype)
        found = tower(pixels, grid_thw=pictures["image_grid_thw"])
        return Seen(found.pooler_output, list(getattr(found, "deepstack_features", None) or ()))

    def arguments(
        self, model: Any, inputs: Mapping[str, torch.Tensor], of_picture: torch.Tensor, seen: Seen
    ) -> dict[str, Any]:
        """Return the decoder's other arguments, see ChatFamily."""
        added = dict(visual_pos_masks=of_picture, deepstack_visual_embeds=seen.more) if seen.more else {}
        positions = inputs["position_ids"].permute(2, 0, 1)
        return super().arguments(model, inputs, of_picture, seen) | {"position_ids": positions} | added

    def reader(self, model: Any, collator: Collator) -> QwenReader:
        """Return what reads prefixes and tokens with a model of plain weights."""
        assert isinstance(collator, QwenCollator)
        return QwenReader(model, collator, self.look)

    def sizes(self, config: Any, image_tokens: int | None = None) -> Sizes:
        """Return the sizes of a config, for a picture of as many tokens as it may take."""
        text, vision = config.get_text_config(), config.vision_config
        d, f, heads = vision.hidden_size, vision.intermediate_size, vision.num_heads
        third = config.model_type == "qwen3_vl"
        if third:
            linears = dict(linear_fc1=(d, f), linear_fc2=(f, d))
        else:
            linears = dict(gate_proj=(d, f), up_proj=(d, f), down_proj=(f, d))
        encoder = Tower(
            vision.depth, d, f, heads, heads, d // heads, norms=2, linears=dict(qkv=(d, 3 * d), proj=(d, d), **linears)
        )
        joined = d * vision.spatial_merge_size**2
        deep = len(vision.deepstack_visual_indexes) if third else 0
        mergers = (1 + deep) * (joined * joined + joined * vision.out_hidden_size)
        patches = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        patches_seen = (image_tokens or IMAGE_TOKENS) * vision.spatial_merge_size**2
        other = d * (patches + (vision.num_position_embeddings if third else 0)) + own_head(config)
        decoder = Tower.of_decoder(text, head_norms=third, causal=True)
        return Sizes(decoder, encoder, text.vocab_size, patches_seen, mergers, other)


def _attend(
    module: Any, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float,
    cu_seq_lens_q: torch.Tensor, max_length_q: int, **more: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Compute a tower's attention as one of transformers' attention functions; query and others are 1 x H x N x E."""
    query, keys, values = (part[0].transpose(0, 1) for part in (query, keys, values))
    return attention_by_segments(query, keys, values, cu_seq_lens_q, max_length_q, scaling)[None], None


# Only to functions whose names contain "flash" does transformers hand all windows at once. To others it gives them one
# by one, which takes longer than all else that a picture needs: there are about 80 in a receipt, in each of 28 layers.
BY_SEGMENTS = "im2json_instead_of_flash"
AttentionInterface.register(BY_SEGMENTS, _attend)


class Qwen25(Qwen):
    """Qwen2.5-VL. Its tower attends within windows, which its own modules lay out."""

    model_types: Sequence[str] = ("qwen2_5_vl",)
    text_types: Sequence[str] = ("qwen2_5_vl_text",)
    hub_names: ClassVar[Mapping[str, str]] = {"model.language_model.": "model.", "model.visual.": "visual."}

    def look(self, model: Any, pictures: Pictures) -> Seen:
        """Return what the decoder gets of B pictures."""
        model.model.visual.config._attn_implementation = BY_SEGMENTS
        return super().look(model, pictures)


class QwenCollator(ChatCollator):
    """Hands pictures over as patches, and counts positions in time, height and width."""

    placeholder = token = Qwen.token
    scaled = staticmethod(smart_resize)  # height and width of a picture as the model sees it

    def __init__(self, processor: QwenProcessor, prompt: str, trim: Trim = "off") -> None:
        shown = processor.image_processor
        self.merge, pixels = shown.merge_size, shown.size["longest_edge"]
        most = pixels // (shown.patch_size * shown.merge_size) ** 2
        self.narrowest = min(NARROWEST, most)  # a side takes one token at least
        self.block = self.merge  # patches that lie side by side in their order, in both directions
        self.largest = (1, self.merge, most * self.merge)
        super().__init__(processor, prompt, trim)
        self.described = (
            f"a picture in its own shape, scaled down to {pixels:,} pixels ({most:,} image tokens) if larger"
        )

    def expansion(self, grid: Grid) -> str:
        """Return as many image tokens as the picture has."""
        return self.token * (math.prod(grid) // self.merge**2)

    def grids(self, pictures: Mapping[str, torch.Tensor]) -> list[Grid]:
        """Return the patches in time, height and width of each of B pictures."""
        return [tuple(grid) for grid in pictures["image_grid_thw"].tolist()]

    def image_tokens(self, width: int, height: int) -> tuple[int, float]:
        """Return how many tokens a picture of so many pixels takes, and the scale that it is seen in."""
        shown = self.processor.image_processor
        patches = shown.get_number_of_image_patches(height, width)
        return patches // self.merge**2, math.sqrt(patches * shown.patch_size**2 / (width * height))

    def shown(self, image: Image.Image) -> Image.Image:
        """Return what of a picture goes to the image processor: on white, if it is very narrow."""
        image = super().shown(image)
        width, height = image.size
        least = max(width, -(-height // self.narrowest)), max(height, -(-width // self.narrowest))
        return image if least == image.size else ImageOps.pad(image, least, color="white")

    def pictures(self, images: Sequence[Image.Image]) -> Pictures:
        """Return {"patches": B x N x patch, bytes padded with zeros, "image_grid_thw": B x 3, "levels": B x 2 x 3}.

        Levels are what the model gets for black and for white in each colour. The image processor itself would return
        8 times as much: each patch twice, as if it were of a film, in fp32.
        """
        parts = [self._patches(self.shown(image)) for image in images]
        return {
            "patches": torch.nn.utils.rnn.pad_sequence([patches for patches, _ in parts], batch_first=True),
            "image_grid_thw": torch.tensor([grid for _, grid in parts]),
            "levels": self.levels(len(images)),
        }

    def _patches(self, image: Image.Image) -> tuple[torch.Tensor, tuple[int, int, int]]:
        """Return the N patches of a picture, block by block, and the grid's sizes in time, height and width."""
        shown, block = self.processor.image_processor, self.block
        size, pixels = shown.patch_size, shown.size
        height, width = self.scaled(
            image.height, image.width, size * self.merge, pixels["shortest_edge"], pixels["longest_edge"]
        )
        colours = np.asarray(image.resize((width, height), shown.resample))  # height x width x 3
        high, wide = height // size, width // size
        blocks = colours.reshape(high // block, block, size, wide // block, block, size, 3)
        patches = blocks.transpose(0, 3, 1, 4, 6, 2, 5).reshape(high * wide, -1)
        return torch.from_numpy(patches), (1, high, wide)

    def positions(self, pictures: Mapping[str, torch.Tensor], length: int) -> dict[str, torch.Tensor]:
        """Return {"position_ids": B x S x 3}: in time, height and width (M-RoPE, https://arxiv.org/abs/2409.12191).

        A token of the picture stands at its row and column, counted from where the picture begins. Text goes on behind
        the picture's longer side, the same in all three.
        """
        rows = []
        for (_, height, width), offset in zip(pictures["image_grid_thw"].tolist(), self.offsets(pictures)):
            start, high, wide = self.begins, height // self.merge, width // self.merge
            places = torch.arange(length)[:, None].repeat(1, 3)  # S x 3
            end = start + high * wide
            places[start:end, 0] = start
            places[start:end, 1] = start + torch.arange(high).repeat_interleave(wide)
            places[start:end, 2] = start + torch.arange(wide).repeat(high)
            places[end:] += offset
            rows.append(places)
        return {"position_ids": torch.stack(rows)}

    def offsets(self, pictures: Mapping[str, torch.Tensor]) -> list[int]:
        """Return what is added to the place of a token behind the picture to get its position; B."""
        grids = pictures["image_grid_thw"].tolist()
        return [max(h, w) // self.merge - h * w // self.merge**2 for _, h, w in grids]

    def seen(self, pictures: Pictures) -> Image.Image:
        """Return the picture in the size that the model sees."""
        size, block = self.processor.image_processor.patch_size, self.block
        ((_, height, width),) = pictures["image_grid_thw"].tolist()
        patches = pictures["patches"][0, : height * width]
        blocks = patches.view(height // block, width // block, block, block, 3, size, size)
        return Image.fromarray(blocks.permute(0, 2, 5, 1, 3, 6, 4).reshape(height * size, width * size, 3).numpy())


class QwenReader(ChatReader):
    """Reads tokens with positions in three directions."""

    def read_tokens(self, tokens: torch.Tensor, rotations: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Read tokens behind the prefixes, whose position is the same in time, height and width; see Reader."""
        return super().read_tokens(tokens, rotations.expand(3, -1, -1), cache)

    def places(self, pictures: Pictures, length: int) -> torch.Tensor:
        """Return the positions of prefixes, 3 x B x P."""
        return self.collator.positions(pictures, length)["position_ids"].permute(2, 0, 1)

    def rotary(self, hidden: torch.Tensor, rotations: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines, B x S x E each, of rotary positions in three directions, 3 x B x S."""
        found = super().rotary(hidden, rotations, kind)
        if found[0].ndim == 3:
            return found
        # Up to transformers 5.23 Qwen2.5-VL's layers put the three together, a section of the head after the other.
        sections = self.config.rope_parameters["mrope_section"] * 2
        cos, sin = (
            torch.cat([part[i % 3] for i, part in enumerate(values.split(sections, -1))], -1) for values in found
        )
        return cos, sin


def pixel_values(pictures: Mapping[str, torch.Tensor], frames: int, dtype: torch.dtype) -> torch.Tensor:
    """Return what transformers' image processor makes of B pictures, for a tower that sees so many frames at a time.

    Returns:
        Normalised pixels of all patches, one picture after the other: sum of N x (3 x frames x height x width).
    """
    seen = []
    counts = pictures["image_grid_thw"].prod(1).tolist()
    for patches, count, levels in zip(pictures["patches"], counts, pictures["levels"]):
        pixels = normalised(levels[None], patches[None, :count].unflatten(2, (3, -1, 1)))[0]
        pixels = pixels.to(dtype).movedim(3, 2)  # N x 3 x 1 x (height x width)
        seen.append(pixels.expand(-1, -1, frames, -1).flatten(1))
    return torch.cat(seen)
