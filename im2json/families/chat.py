"""Chat models: an example is laid out by the model's own chat template. Their own modules compute everything.

What all of them share is here. Their pictures, and how their decoders are called, are in modules of their own.
"""

from __future__ import annotations

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from huggingface_hub import snapshot_download
from jinja2 import TemplateError
from transformers import AutoTokenizer

from im2json.data.collate import Collator, Pictures
from im2json.errors import UserError, first_line
from im2json.families.base import PictureFeatures, as_on_hub, check_processor, refuse
from im2json.families.reader import TextReader
from im2json.files import write_json
from im2json.model.base import from_pretrained
from im2json.options import DataOptions, Trim

# B examples, S positions, P prefix positions, I image tokens, D hidden.
Grid = tuple[int, ...]
"""Rows and columns of patches or tiles, from which the tokens of a picture are counted."""
IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")
"""Files that describe the image processor: alone, or as a part of the whole processor."""
FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "chat_template.json", "video_preprocessor_config.json", *IMAGE_FILES,
)  # fmt: skip
"""Files that transformers makes a processor from."""


def refuse_in_chat(options: DataOptions, **reasons: str) -> None:
    """Refuse options that mean nothing to a family, as `refuse` does, and what only PaliGemma knows."""
    refuse(options, prefix_mask="it is PaliGemma's, whose prompt attends in both directions", **reasons)


class ChatProcessor:
    """Tokenizer, image processor and chat template of a model.

    transformers' own processors of some families ask for a video processor, and that for torchvision.

    Args:
        files: the folder that holds the model's processor.

    Raises:
        ValueError: if the image processor's size, mean or standard deviation is not of the family's form.
    """

    image_processor_class: ClassVar[Any]
    features: int  # of a picture, or of a tile of it, where the model makes a fixed number
    sizes: ClassVar[frozenset[str]]  # names in the image processor's `size`

    def __init__(self, files: Path) -> None:
        self.files = files
        self.tokenizer: Any = AutoTokenizer.from_pretrained(files)
        self.image_processor: Any = self.image_processor_class.from_pretrained(files)
        if not self.sizes <= dict(self.image_processor.size).keys():
            wanted, found = " and ".join(sorted(self.sizes)), dict(self.image_processor.size)
            raise ValueError(f"{files}: the size of its image processor must have {wanted}, and is {found}")
        for name in ("image_mean", "image_std"):
            value = getattr(self.image_processor, name)
            if not isinstance(value, Sequence) or len(value) != 3:
                raise ValueError(f"{files}: {name} of its image processor must be three numbers, and is {value}")
        apart = files / "chat_template.json"  # which transformers reads for its own processors alone
        if not self.tokenizer.chat_template and apart.is_file():
            self.tokenizer.chat_template = json.loads(apart.read_text("utf-8")).get("chat_template")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    @classmethod
    def from_pretrained(cls, path: str) -> ChatProcessor:
        """Load what a folder holds, or a model on the hub."""
        return cls(Path(path) if Path(path).is_dir() else Path(snapshot_download(path, allow_patterns=list(FILES))))

    def save_pretrained(self, folder: Path) -> None:
        """Copy the base's files, so that plain transformers finds them, with the size that pictures are scaled to."""
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


class Seen(NamedTuple):
    """Holds what a decoder gets of pictures."""

    features: torch.Tensor  # one picture after the other: sum of I x D, or B x I x D
    more: Sequence[torch.Tensor] = ()  # added after each of its first layers; sum of I x D


class ChatFamily(ABC):
    """Answers what all chat models answer alike, see families.base.Family."""

    processor_class: ClassVar[Any]  # a ChatProcessor
    token: ClassVar[str]  # stands for each feature of a picture
    records_steps = False
    hub_names: ClassVar[Mapping[str, str]] = {}  # beginnings of weights' names here, and what they are on the hub

    def load_processor(self, model: str, config: Any) -> ChatProcessor:
        """Load what of a processor is needed, without torchvision, and compare it with the model's config.

        Raises:
            UserError: if it cannot be loaded, or would make other inputs than the model takes.
        """
        processor = from_pretrained(self.processor_class, model)
        processor.features = self.features_of_a_picture(config)
        needed = self.needed(config, processor)
        needed[f"the id of {self.token}"] = processor.tokenizer.convert_tokens_to_ids(self.token), config.image_token_id
        check_processor(processor.files, model, needed)
        return processor

    def features_of_a_picture(self, config: Any) -> int:
        """Return how many features a picture has, or a tile of it; 0 if that depends on the picture."""
        return 0

    @abstractmethod
    def needed(self, config: Any, processor: Any) -> dict[str, tuple[Any, Any]]:
        """Return settings that processor and model must share, by name: the processor's value and the model's."""

    @abstractmethod
    def look(self, model: Any, pictures: Pictures) -> Seen:
        """Return what the decoder gets of B pictures."""

    def hidden_states(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the last hidden states of pictures, prompts and targets; B x S x D.

        Args:
            inputs: input_ids (B, S), padded on the right; positions, if the collator counts them; pictures, or
                image_features (B, I, D) as they are computed from those.
        """
        of_picture = inputs["input_ids"] == model.config.image_token_id  # B x S
        kept = inputs.get("image_features")
        seen = Seen(kept) if kept is not None else self.look(model, inputs)
        words = model.get_input_embeddings()(inputs["input_ids"])  # B x S x D
        return model.get_decoder()(
            inputs_embeds=words.masked_scatter(of_picture[..., None], seen.features.to(words.dtype)),
            use_cache=False,
            **self.arguments(model, inputs, of_picture, seen),
        ).last_hidden_state

    def arguments(
        self, model: Any, inputs: Mapping[str, torch.Tensor], of_picture: torch.Tensor, seen: Seen
    ) -> dict[str, Any]:
        """Return the decoder's other arguments. of_picture: B x S"""
        return {"attention_mask": None}  # it is causal, so what stands before the padding does not see it

    def features(self, model: Any) -> PictureFeatures | None:
        """Return None: pictures differ in size."""
        return None

    def reader(self, model: Any, collator: Collator) -> ChatReader:
        """Return what reads prefixes and tokens with a model of plain weights."""
        assert isinstance(collator, ChatCollator)
        return ChatReader(model, collator, self.look)

    def hub_layout(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return a model's weights under the names that they have on the hub."""
        return as_on_hub(weights, self.hub_names)


def normalised(levels: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return what a model gets for the bytes of B pictures, whose colours are their third dimension from the right.

    Args:
        levels: what it gets for black and for white in each colour; B x 2 x 3.
        values: B x ... x 3 x H x W.
    """
    shape = (len(levels), *[1] * (values.ndim - 4), 3, 1, 1)
    black, white = (level.reshape(shape) for level in levels.unbind(1))
    return black + (white - black) / 255 * values


class ChatCollator(Collator):
    """Lays out examples by the model's chat template: one user message of picture and prompt, the answer, and the token
    that stops an answer. What the template writes after that is never generated, so it is not learned either.

    Raises:
        UserError: if the model has no chat template, or one whose answers do not follow their prompts directly.
    """

    placeholder: ClassVar[str]  # what the template writes for a picture
    token: ClassVar[str]  # what stands for each of a picture's features
    largest: Grid  # that a picture may have, set before this class's __init__

    def __init__(self, processor: ChatProcessor, prompt: str, trim: Trim = "off") -> None:
        super().__init__(processor, prompt, trim)
        tokenizer = processor.tokenizer
        if not tokenizer.chat_template:
            raise UserError(f"{processor.files} has no chat template: use an instruct model, whose tokenizer has one")
        template = f"the chat template of {processor.files}"
        ask = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
        before = self._render([ask], add_generation_prompt=True)
        answered = self._render([ask, {"role": "assistant", "content": [{"type": "text", "text": "ANSWER"}]}])
        between, found, after = answered.removeprefix(before).partition("ANSWER")
        if not answered.startswith(before) or not found or between.strip(" "):
            raise UserError(
                f"{template} does not put an answer directly behind its prompt, so what is learned "
                f"would not be what is generated: it ends a prompt with {before[-40:]!r}, but writes {answered[-80:]!r}"
            )
        ends = tokenizer(after, add_special_tokens=False)["input_ids"]
        if not ends or (ends[0] not in tokenizer.all_special_ids and ends[0] not in tokenizer.added_tokens_decoder):
            raise UserError(f"{template} ends no answer with a special token")
        if before.count(self.placeholder) != 1:
            raise UserError(f"{template} does not put one {self.placeholder} into a message with a picture")
        self.layout, self.lead, self.stop = before, between, ends[0]
        bos = tokenizer.bos_token
        added = bos is not None and tokenizer("")["input_ids"] == [tokenizer.bos_token_id]
        self.text = before.removeprefix(bos) if added else before  # tokenizers that begin texts with it do so once more
        self.image_token = tokenizer.convert_tokens_to_ids(self.token)
        self._prefixes: dict[Grid, list[int]] = {}
        longest = self.prefix(self.largest)
        self.longest_prefix, self.last = len(longest), longest[-1]
        self.begins = longest.index(self.image_token)  # the place of a picture's first feature

    @abstractmethod
    def grids(self, pictures: Mapping[str, torch.Tensor]) -> list[Grid]:
        """Return the grid of each of B pictures."""

    @abstractmethod
    def expansion(self, grid: Grid) -> str:
        """Return what the model's processor writes for a picture where its template has the placeholder."""

    def prefix(self, grid: Grid) -> list[int]:
        """Return the tokens of a picture with such a grid, and of the prompt."""
        if grid not in self._prefixes:
            text = self.layout.replace(self.placeholder, self.expansion(grid))
            self._prefixes[grid] = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
            assert len(self._prefixes[grid]) <= len(self._prefixes[self.largest]), f"{grid} is above {self.largest}"
        return self._prefixes[grid]

    def prefixes(self, pictures: Mapping[str, torch.Tensor]) -> list[list[int]]:
        """Return the tokens before each answer, as many of them for the picture as it has features."""
        return [self.prefix(grid) for grid in self.grids(pictures)]

    def offsets(self, pictures: Mapping[str, torch.Tensor]) -> list[int]:
        """Return what is added to the place of a token behind the picture to get its position; B."""
        return [0] * len(self.grids(pictures))

    def levels(self, count: int) -> torch.Tensor:
        """Return what the model gets for black and for white in each colour, for so many pictures; B x 2 x 3."""
        shown = self.processor.image_processor
        mean, std = torch.tensor(shown.image_mean), torch.tensor(shown.image_std)
        return torch.stack([-mean / std, (1 - mean) / std]).repeat(count, 1, 1)

    def _render(self, messages: list[dict[str, Any]], **more: Any) -> str:
        try:
            return self.processor.tokenizer.apply_chat_template(messages, tokenize=False, **more)
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            files = self.processor.files
            raise UserError(f"the chat template of {files} cannot be rendered: {first_line(error)}") from error


class ChatReader(TextReader):
    """Reads prefixes whose lengths depend on their pictures, and the tokens after them."""

    def __init__(self, model: Any, collator: ChatCollator, look: Callable[[Any, Pictures], Seen]) -> None:
        super().__init__(model, model.get_decoder(), collator)
        self.collator, self.look = collator, look
        stops = model.generation_config.eos_token_id
        self.stops = sorted({collator.stop, *([stops] if isinstance(stops, int) else stops or ())})

    def read_prefixes(self, pictures: Pictures, cache: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Read what precedes the answers to B pictures; see Reader."""
        device = self.like.device
        prefixes = [torch.tensor(prefix) for prefix in self.collator.prefixes(pictures)]
        ids = torch.nn.utils.rnn.pad_sequence(prefixes, batch_first=True).to(device)  # B x P
        lengths = torch.tensor(list(map(len, prefixes)), device=device)
        of_picture = ids == self.collator.image_token  # B x P
        seen = self.look(self.model, pictures)
        words = self.text.embed_tokens(ids)
        place = of_picture[..., None]  # B x P x 1
        added = [torch.zeros_like(words).masked_scatter(place, part.to(words.dtype)) for part in seen.more]
        hidden = words.masked_scatter(place, seen.features.to(words.dtype))
        self.look_back(cache, lengths, of_picture)
        self._read_prefixes(hidden, self.places(pictures, ids.shape[1]).to(device), cache, added)
        return lengths, torch.tensor(self.collator.offsets(pictures), device=device)

    def places(self, pictures: Pictures, length: int) -> torch.Tensor:
        """Return the rotary positions of prefixes, padded to so many tokens."""
        return torch.arange(length)[None]

    def look_back(self, cache: Any, lengths: torch.Tensor, of_picture: torch.Tensor) -> None:
        """Say who attends to whom in prefixes with so many tokens, B. of_picture: B x P"""
        cache.look_back(lengths, of_picture.shape[1])
