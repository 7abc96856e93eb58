"""SmolVLM2 and Idefics 3 (Granite-Docling among others), which cut pictures into tiles."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from im2json.data.collate import Collator, Pictures
from im2json.errors import UserError
from im2json.families.base import own_head
from im2json.families.chat import ChatCollator, ChatFamily, ChatProcessor, Grid, Seen, normalised, refuse_in_chat
from im2json.model.memory import Sizes, Tower
from im2json.options import DataOptions, Trim

# B examples, S positions, T tiles of a picture at most, I image tokens, D hidden.
MOST_TILES = 17
"""Tiles that a picture takes with the published sizes, the whole picture included."""
LONGEST = 4096
"""Pixels of a picture's longer side, at most, whatever the image processor's size says."""


class TilesProcessor(ChatProcessor):
    """Scales a picture so that its longer side has a given length, and cuts it into square tiles."""

    image_processor_class = Idefics3ImageProcessorPil
    sizes = frozenset({"longest_edge"})

    @property
    def tile(self) -> int:
        """Return the pixels of a tile's side."""
        return self.image_processor.max_image_size["longest_edge"]

    def limit(self, tiles: int) -> None:
        """Scale pictures down so that they take so many tiles, the whole picture included."""
        most = max(1, math.isqrt(max(tiles - 1, 1))) * self.tile
        self.image_processor.size = {"longest_edge": min(self.image_processor.size["longest_edge"], most)}


class Tiles(ChatFamily):
    """SmolVLM2 and Idefics 3, whose classes differ in their names alone."""

    model_types: Sequence[str] = ("smolvlm", "idefics3")
    text_types: Sequence[str] = ("llama",)
    tower = "vision_model"
    processor_class = TilesProcessor
    token = "<image>"

    def features_of_a_picture(self, config: Any) -> int:
        """Return how many features a tile has."""
        return (config.vision_config.image_size // config.vision_config.patch_size) ** 2 // config.scale_factor**2

    def needed(self, config: Any, processor: Any) -> dict[str, tuple[Any, Any]]:
        """Return settings of the processor and what they must be; see ChatFamily."""
        tile = dict(processor.image_processor.max_image_size).get("longest_edge")
        return {"max_image_size, longest_edge": (tile, config.vision_config.image_size)}

    def collator(self, processor: Any, options: DataOptions) -> Collator:
        """Return the collator.

        Raises:
            UserError: if prompt or template cannot be used, `letterbox` is asked for, or too few image tokens are.
        """
        refuse_in_chat(options, letterbox="this model sees pictures in nearly their own shape")
        return TilesCollator(processor, options.prompt, options.trim, options.image_tokens)

    def look(self, model: Any, pictures: Pictures) -> Seen:
        """Return what the decoder gets of B pictures, tile by tile."""
        tower, counts = model.model.vision_model, (pictures["grid"].prod(1) + 1).tolist()
        pixels = normalised(pictures["levels"], pictures["tiles"]).to(tower.dtype)  # B x T x 3 x H x W
        real = torch.cat([tiles[:count] for tiles, count in zip(pixels, counts)])  # sum of T x 3 x H x W
        return Seen(model.model.connector(tower(pixel_values=real).last_hidden_state).flatten(0, 1))

    def sizes(self, config: Any, image_tokens: int | None = None) -> Sizes:
        """Return the sizes of a config, for a picture of as many tokens as it may take."""
        text, vision = config.get_text_config(), config.vision_config
        d = vision.hidden_size
        encoder = Tower.of_siglip(vision)
        shuffled = config.scale_factor**2
        patches = (vision.image_size // vision.patch_size) ** 2
        other = d * (3 * vision.patch_size**2 + patches) + own_head(config)
        decoder = Tower.of_decoder(text, causal=True)
        seen = MOST_TILES * patches if image_tokens is None else image_tokens * shuffled
        return Sizes(decoder, encoder, text.vocab_size, seen, d * shuffled * text.hidden_size, other)


class TilesCollator(ChatCollator):
    """Hands pictures over as square tiles, row by row, and the whole picture as one more."""

    placeholder = token = Tiles.token

    def __init__(
        self, processor: TilesProcessor, prompt: str, trim: Trim = "off", image_tokens: int | None = None
    ) -> None:
        tokenizer = processor.tokenizer
        self.tile = processor.tile
        self.around = getattr(tokenizer, "fake_image_token", "<fake_token_around_image>")
        self.whole = getattr(tokenizer, "global_image_token", "<global-img>")
        self.features = processor.features
        if image_tokens is not None:
            if image_tokens < self.features:
                raise UserError(
                    f"--image-tokens {image_tokens}: a tile takes {self.features} tokens with this model, "
                    "so give at least as many"
                )
            processor.limit(image_tokens // self.features)
        self.longest = processor.image_processor.size["longest_edge"]
        side = math.ceil(min(self.longest, LONGEST) / self.tile)
        self.largest = (side, side) if side > 1 else (0, 0)
        super().__init__(processor, prompt, trim)
        self.described = f"a picture scaled to {side * self.tile} pixels on its longer side, in tiles of {self.tile}"

    def expansion(self, grid: Grid) -> str:
        """Return the tokens of all tiles, each with its row and column, and of the whole picture."""
        rows, columns = grid
        features = self.token * self.features
        tiles = [
            "".join(f"{self.around}<row_{row + 1}_col_{column + 1}>{features}" for column in range(columns)) + "\n"
            for row in range(rows)
        ]
        return "".join(tiles) + ("\n" if tiles else "") + f"{self.around}{self.whole}{features}{self.around}"

    def grids(self, pictures: Mapping[str, torch.Tensor]) -> list[Grid]:
        """Return the rows and columns of tiles of each of B pictures, 0 and 0 if the whole is all there is."""
        return [tuple(grid) for grid in pictures["grid"].tolist()]

    def image_tokens(self, width: int, height: int) -> tuple[int, float]:
        """Return how many tokens a picture of so many pixels takes, and the scale that it is seen in."""
        rows, columns = _tiles(width, height, self.longest, self.tile)
        scale = min(max(columns, 1) * self.tile / width, max(rows, 1) * self.tile / height)
        return (rows * columns + 1) * self.features, scale

    def pictures(self, images: Sequence[Image.Image]) -> Pictures:
        """Return {"tiles": B x T x 3 x H x W, bytes padded with zeros, "grid": B x 2, "levels": B x 2 x 3}."""
        shown = self.processor.image_processor
        found = shown(
            [[self.shown(image)] for image in images], do_resize=True, do_image_splitting=True, do_pad=True,
            do_rescale=False, do_normalize=False, return_row_col_info=True, return_tensors="pt",
        )  # fmt: skip
        grids = [(rows, columns) for (rows,), (columns,) in zip(found["rows"], found["cols"])]
        return {
            "tiles": found["pixel_values"].to(torch.uint8),
            "grid": torch.tensor(grids),
            "levels": self.levels(len(images)),
        }

    def seen(self, pictures: Pictures) -> Image.Image:
        """Return the picture in the size that the model sees."""
        ((rows, columns),) = self.grids(pictures)
        tiles = pictures["tiles"][0]  # T x 3 x H x W
        if not rows:
            return Image.fromarray(tiles[0].permute(1, 2, 0).numpy())
        blocks = tiles[: rows * columns].unflatten(0, (rows, columns))
        return Image.fromarray(blocks.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2).numpy())


def _tiles(width: int, height: int, longest: int, tile: int) -> tuple[int, int]:
    """Return the rows and columns of tiles that the image processor cuts a picture into, 0 and 0 for none.

    It scales in two steps and rounds in both; its own get_number_of_image_patches forgets that one side grows with the
    other in the second.
    """
    longer, shorter = max(width, height), min(width, height)
    ratio = longer / shorter
    shorter = int(longest / ratio)
    shorter = max(shorter + shorter % 2, 1)
    longer, ratio = longest, longest / shorter
    if longer > LONGEST:
        longer, shorter = LONGEST, max(int(LONGEST / ratio), 1)
    many = math.ceil(longer / tile)
    few = max(math.ceil(int(many * tile / (longer / shorter)) / tile), 1)
    if many == few == 1:
        return 0, 0
    return (few, many) if width >= height else (many, few)
