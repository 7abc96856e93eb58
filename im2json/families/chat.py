"""Chat models that read pictures at their own resolution: Qwen3-VL.

Their own modules compute everything. What is ours: the layout of a training example, positions, and reading
prefixes and tokens in decoding.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from jinja2 import TemplateError
from PIL import Image, ImageOps
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from im2json.data.collate import Collator, Pictures
from im2json.errors import UserError, first_line
from im2json.families.base import Cache
from im2json.families.reader import TextReader
from im2json.files import write_json
from im2json.model.base import from_pretrained
from im2json.model.memory import Sizes, Tower
from im2json.options import DataOptions, Trim

# B examples, S positions, P prefix positions, N patches of a picture at most, I image tokens, D hidden.
IMAGE_TOKENS = 1024
"""The most that a picture takes unless --image-tokens says otherwise: about 1,000 x 1,000 pixels with Qwen3-VL."""
NARROWEST = 32
"""A picture that is longer than so many times its width is widened with white: models refuse the narrowest."""
IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")
"""Files that describe the image processor: alone, or as a part of the whole processor."""
FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "chat_template.json", "video_preprocessor_config.json", *IMAGE_FILES,
)  # fmt: skip
"""Files that transformers makes a processor from."""


class ChatProcessor:
    """Tokenizer, image processor and chat template of a model.

    transformers' own Qwen processors ask for a video processor, and that for torchvision.

    Args:
        files: the folder that holds the model's processor.
    """

    def __init__(self, files: Path) -> None:
        self.files = files
        self.tokenizer: Any = AutoTokenizer.from_pretrained(files)
        self.image_processor: Any = Qwen2VLImageProcessorPil.from_pretrained(files)
        if not {"shortest_edge", "longest_edge"} <= dict(self.image_processor.size).keys():
            raise ValueError(f"{files}: the size of its image processor has no shortest_edge and longest_edge")
        apart = files / "chat_template.json"  # which transformers reads for its own processors alone
        if not self.tokenizer.chat_template and apart.is_file():
            self.tokenizer.chat_template = json.loads(apart.read_text("utf-8")).get("chat_template")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    @classmethod
    def from_pretrained(cls, path: str) -> ChatProcessor:
        """Load what a folder holds, or a model on the hub."""
        return cls(Path(path) if Path(path).is_dir() else Path(snapshot_download(path, allow_patterns=list(FILES))))

    def limit(self, image_tokens: int) -> None:
        """Scale pictures down to so many image tokens."""
        shown = self.image_processor
        most = image_tokens * (shown.patch_size * shown.merge_size) ** 2
        # pixels of the whole picture, whatever these names say
        shown.size = {"shortest_edge": min(shown.size["shortest_edge"], most), "longest_edge": most}

    def save_pretrained(self, folder: Path) -> None:
        """Copy the base's files, so that plain transformers finds them, with the limit on image tokens."""
        for name in FILES:
            if (self.files / name).is_file():
                shutil.copy(self.files / name, folder)
        for name in IMAGE_FILES:
            config = json.loads((folder / name).read_text("utf-8")) if (folder / name).is_file() else {}
            part = config if name == IMAGE_FILES[0] else config.get("image_processor")
            if part:
                for old in ("min_pixels", "max_pixels"):  # as earlier versions of transformers had it
                    part.pop(old, None)
                part["size"] = dict(self.image_processor.size)
                write_json(folder / name, config)


class Chat:
    """The family of chat models, see families.base.Family."""

    model_types: Sequence[str] = ("qwen3_vl",)
    tower = "visual"
    records_steps = False  # the tower waits for the GPU to know how large pictures are

    def load_processor(self, model: str) -> ChatProcessor:
        """Load what of a processor is needed, without torchvision."""
        return from_pretrained(ChatProcessor, model)

    def collator(self, processor: Any, options: DataOptions) -> Collator:
        """Return the collator.

        Raises:
            UserError: if prompt or template cannot be used, or `letterbox` is asked for.
        """
        if options.letterbox:
            raise UserError("--letterbox: leave it out, this model sees pictures in their own shape")
        processor.limit(options.image_tokens or IMAGE_TOKENS)
        return ChatCollator(processor, options.prompt, options.trim)

    def hidden_states(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the last hidden states of pictures, prompts and targets; B x S x D.

        Args:
            inputs: input_ids and attention_mask (B, S), padded on the right; position_ids (B, S, 3);
                patches, image_grid_thw and levels (see ChatCollator.pictures).
        """
        pictures = inputs["input_ids"] == model.config.image_token_id  # B x S
        seen, more = _features(model, inputs)
        words = model.get_input_embeddings()(inputs["input_ids"])  # B x S x D
        return model.model.language_model(
            inputs_embeds=words.masked_scatter(pictures[..., None], seen.to(words.dtype)),
            attention_mask=None,  # attention is causal, so what stands before the padding does not see it
            position_ids=inputs["position_ids"].permute(2, 0, 1),
            use_cache=False,
            visual_pos_masks=pictures,
            deepstack_visual_embeds=more,
        ).last_hidden_state

    def features(self, model: Any) -> None:
        """Return None: pictures differ in size, and several layers of the language model get features of them."""

    def reader(self, model: Any, collator: Collator) -> ChatReader:
        """Return what reads prefixes and tokens with a model of plain weights."""
        assert isinstance(collator, ChatCollator)
        return ChatReader(model, collator)

    def sizes(self, config: Any, image_tokens: int | None = None) -> Sizes:
        """Return the sizes of a config, for a picture of as many tokens as it may take."""
        text, vision = config.get_text_config(), config.vision_config
        d, f, heads = vision.hidden_size, vision.intermediate_size, vision.num_heads
        encoder = Tower(
            vision.depth, d, f, heads, heads, d // heads, norms=2,
            linears=dict(qkv=(d, 3 * d), proj=(d, d), linear_fc1=(d, f), linear_fc2=(f, d)),
        )  # fmt: skip
        joined = d * vision.spatial_merge_size**2
        mergers = (1 + len(vision.deepstack_visual_indexes)) * (joined * joined + joined * vision.out_hidden_size)
        patches = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        patches_seen = (image_tokens or IMAGE_TOKENS) * vision.spatial_merge_size**2
        other = d * (patches + vision.num_position_embeddings)
        if not config.tie_word_embeddings:
            other += text.vocab_size * text.hidden_size
        decoder = Tower.of_decoder(text, head_norms=True, causal=True)
        return Sizes(decoder, encoder, text.vocab_size, patches_seen, mergers, other)

    def hub_layout(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return a model's weights under their own names, which are those on the hub; lm_head only if it is another
        than the embedding."""
        embedding = weights["model.language_model.embed_tokens.weight"]
        tied = weights["lm_head.weight"].data_ptr() == embedding.data_ptr()
        return {name: weight for name, weight in weights.items() if not (tied and name == "lm_head.weight")}


class ChatCollator(Collator):
    """Lays out examples by the model's chat template: one user message of picture and prompt, the answer, and the token
    that stops an answer. What the template writes after that is never generated, so it is not learned either.

    Raises:
        UserError: if the model has no chat template, or one whose answers do not follow their prompts directly.
    """

    def __init__(self, processor: ChatProcessor, prompt: str, trim: Trim = "off") -> None:
        super().__init__(processor, prompt, trim)
        tokenizer, shown = processor.tokenizer, processor.image_processor
        if not tokenizer.chat_template:
            raise UserError(f"{processor.files} has no chat template: use an instruct model, whose tokenizer has one")
        template = f"the chat template of {processor.files}"
        ask = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
        before = self._render([ask], add_generation_prompt=True)
        answered = self._render([ask, {"role": "assistant", "content": [{"type": "text", "text": "ANSWER"}]}])
        if not answered.startswith(f"{before}ANSWER"):
            raise UserError(
                f"{template} does not put an answer directly behind its prompt, so what is learned "
                f"would not be what is generated: it ends a prompt with {before[-40:]!r}, but writes {answered[-80:]!r}"
            )
        after = tokenizer(answered.removeprefix(f"{before}ANSWER"), add_special_tokens=False)["input_ids"]
        if not after or (after[0] not in tokenizer.all_special_ids and after[0] not in tokenizer.added_tokens_decoder):
            raise UserError(f"{template} ends no answer with a special token")
        image = "<|image_pad|>"
        if before.count(image) != 1:
            raise UserError(f"{template} does not put one {image} into a message with a picture")
        self.stop = after[0]
        self.image_token = tokenizer.convert_tokens_to_ids(image)
        self.head, self.tail = (
            tokenizer(part, add_special_tokens=False)["input_ids"] for part in before.split(image)
        )  # before and behind the picture
        self.last = self.tail[-1]
        self.merge = shown.merge_size
        most = shown.size["longest_edge"] // (shown.patch_size * shown.merge_size) ** 2
        self.longest_prefix = len(self.head) + most + len(self.tail)
        self.text = before
        pixels = shown.size["longest_edge"]
        self.described = (
            f"a picture in its own shape, scaled down to {pixels:,} pixels ({most:,} image tokens) if larger"
        )

    def image_tokens(self, width: int, height: int) -> tuple[int, float]:
        """Return how many tokens a picture of so many pixels takes, and the scale that it is seen in."""
        shown = self.processor.image_processor
        patches = shown.get_number_of_image_patches(height, width)
        return patches // self.merge**2, math.sqrt(patches * shown.patch_size**2 / (width * height))

    def shown(self, image: Image.Image) -> Image.Image:
        """Return what of a picture goes to the image processor: on white, if it is very narrow."""
        image = super().shown(image)
        width, height = image.size
        least = max(width, -(-height // NARROWEST)), max(height, -(-width // NARROWEST))
        return image if least == image.size else ImageOps.pad(image, least, color="white")

    def pictures(self, images: Sequence[Image.Image]) -> Pictures:
        """Return {"patches": B x N x patch, bytes padded with zeros, "image_grid_thw": B x 3, "levels": B x 2 x 3}.

        Levels are what the model gets for black and for white in each colour. The image processor itself would return
        8 times as much: each patch twice, as if it were of a film, in fp32.
        """
        shown = self.processor.image_processor
        mean, std = torch.tensor(shown.image_mean), torch.tensor(shown.image_std)
        levels = torch.stack([-mean / std, (1 - mean) / std])
        parts = [self._patches(self.shown(image)) for image in images]
        return {
            "patches": torch.nn.utils.rnn.pad_sequence([patches for patches, _ in parts], batch_first=True),
            "image_grid_thw": torch.tensor([grid for _, grid in parts]),
            "levels": levels.repeat(len(images), 1, 1),
        }

    def _patches(self, image: Image.Image) -> tuple[torch.Tensor, tuple[int, int, int]]:
        """Return the N patches of a picture, those that become one token side by side, and the grid's sizes in time,
        height and width."""
        shown, merge = self.processor.image_processor, self.merge
        size, pixels = shown.patch_size, shown.size
        height, width = smart_resize(
            image.height, image.width, size * merge, pixels["shortest_edge"], pixels["longest_edge"]
        )
        colours = np.asarray(image.resize((width, height), shown.resample))  # height x width x 3
        high, wide = height // size, width // size
        blocks = colours.reshape(high // merge, merge, size, wide // merge, merge, size, 3)
        patches = blocks.transpose(0, 3, 1, 4, 6, 2, 5).reshape(high * wide, -1)
        return torch.from_numpy(patches), (1, high, wide)

    def prefixes(self, pictures: Mapping[str, torch.Tensor]) -> list[list[int]]:
        """Return the tokens before each answer, as many of them for the picture as it has features."""
        counts = (pictures["image_grid_thw"].prod(1) // self.merge**2).tolist()
        return [[*self.head, *[self.image_token] * count, *self.tail] for count in counts]

    def positions(self, pictures: Mapping[str, torch.Tensor], length: int) -> dict[str, torch.Tensor]:
        """Return {"position_ids": B x S x 3}: in time, height and width (M-RoPE, https://arxiv.org/abs/2409.12191).

        A token of the picture stands at its row and column, counted from where the picture begins. Text goes on behind
        the picture's longer side, the same in all three.
        """
        rows = []
        for (_, height, width), offset in zip(pictures["image_grid_thw"].tolist(), self.offsets(pictures)):
            start, high, wide = len(self.head), height // self.merge, width // self.merge
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
        shown, merge = self.processor.image_processor, self.merge
        ((_, height, width),) = pictures["image_grid_thw"].tolist()
        size = shown.patch_size
        patches = pictures["patches"][0, : height * width]
        blocks = patches.view(height // merge, width // merge, merge, merge, 3, size, size)
        return Image.fromarray(blocks.permute(0, 2, 5, 1, 3, 6, 4).reshape(height * size, width * size, 3).numpy())

    def _render(self, messages: list[dict[str, Any]], **more: Any) -> str:
        try:
            return self.processor.tokenizer.apply_chat_template(messages, tokenize=False, **more)
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            files = self.processor.files
            raise UserError(f"the chat template of {files} cannot be rendered: {first_line(error)}") from error


class ChatReader(TextReader):
    """Reads prefixes whose lengths depend on their pictures, and the tokens after them."""

    def __init__(self, model: Any, collator: ChatCollator) -> None:
        super().__init__(model, model.model.language_model, collator)
        self.collator = collator
        stops = model.generation_config.eos_token_id
        self.stops = sorted({collator.stop, *([stops] if isinstance(stops, int) else stops or ())})

    def read_tokens(self, tokens: torch.Tensor, rotations: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Read tokens behind the prefixes, whose position is the same in time, height and width; see Reader."""
        return super().read_tokens(tokens, rotations.expand(3, -1, -1), cache)

    def read_prefixes(self, pictures: Pictures, cache: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Read what precedes the answers to B pictures; see Reader."""
        device = self.like.device
        grids = {"image_grid_thw": pictures["image_grid_thw"].cpu()}
        prefixes = [torch.tensor(prefix) for prefix in self.collator.prefixes(grids)]
        ids = torch.nn.utils.rnn.pad_sequence(prefixes, batch_first=True).to(device)  # B x P
        lengths = torch.tensor(list(map(len, prefixes)), device=device)
        places = self.collator.positions(grids, ids.shape[1])["position_ids"].to(device)  # B x P x 3
        of_picture = (ids == self.collator.image_token)[..., None]  # B x P x 1
        seen, more = _features(self.model, pictures)
        words = self.text.embed_tokens(ids)
        added = [torch.zeros_like(words).masked_scatter(of_picture, part.to(words.dtype)) for part in more]
        hidden = words.masked_scatter(of_picture, seen.to(words.dtype))
        cache.look_back(lengths, ids.shape[1])
        self._read_prefixes(hidden, places.permute(2, 0, 1), cache, added)
        return lengths, torch.tensor(self.collator.offsets(grids), device=device)


def _features(model: Any, pictures: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return what the language model gets of all pictures, one after the other: sum of I x D, and the same for each of
    its first layers (DeepStack, https://arxiv.org/abs/2406.04334)."""
    tower = model.model.visual
    pixels = pixel_values(pictures, tower.config.temporal_patch_size, tower.dtype)
    found = tower(pixels, grid_thw=pictures["image_grid_thw"])
    return found.pooler_output, list(found.deepstack_features)


def pixel_values(pictures: Mapping[str, torch.Tensor], frames: int, dtype: torch.dtype) -> torch.Tensor:
    """Return what transformers' image processor makes of B pictures, for a tower that sees so many frames at a time.

    Returns:
        Normalised pixels of all patches, one picture after the other: sum of N x (3 x frames x height x width).
    """
    seen = []
    counts = pictures["image_grid_thw"].prod(1).tolist()
    for patches, count, (black, white) in zip(pictures["patches"], counts, pictures["levels"][..., None]):
        pixels = black + (white - black) / 255 * patches[:count].unflatten(1, (3, -1))  # N x 3 x (height x width)
        seen.append(pixels.to(dtype)[:, :, None].expand(-1, -1, frames, -1).flatten(1))
    return torch.cat(seen)
