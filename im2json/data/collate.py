"""Examples in, batches out: where the prefix ends and what is learned is decided here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from im2json.data.example import Example
from im2json.data.trim import trimmed
from im2json.errors import UserError
from im2json.jsontext import canonical
from im2json.options import Trim
from im2json.text import is_utf8, shortened

# B examples, S positions, P prefix positions (picture and prompt), T target tokens with the one that stops an answer.
IGNORE = -100
TEXT = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
"""The inputs that have S positions. All others are those of pictures."""

Pictures = dict[str, torch.Tensor]
"""The inputs of B pictures: tensors of B rows each."""


def join_pictures(parts: Sequence[Pictures]) -> Pictures:
    """Return the rows of all parts as one, each padded with zeros to the longest where their lengths differ."""
    joined = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        longest = max(value.shape[1] for value in values)
        joined[name] = torch.cat([_lengthened(value, longest - value.shape[1]) for value in values])
    return joined


@dataclass(frozen=True)
class Batch:
    """A microbatch, padded on the right."""

    ids: list[str]
    inputs: dict[str, torch.Tensor]  # of B rows each: those in TEXT, and those of the pictures
    labels: torch.Tensor  # B x S

    def to(self, device: torch.device) -> Batch:
        inputs = {name: value.to(device, non_blocking=True) for name, value in self.inputs.items()}
        return Batch(self.ids, inputs, self.labels.to(device, non_blocking=True))

    def cut(self, most: int) -> list[Batch]:
        """Return the batch in parts of at most `most` examples, each padded no further than its longest."""
        if len(self.ids) <= most:
            return [self]
        return [self._part(start, start + most) for start in range(0, len(self.ids), most)]

    def padded(self, multiple: int) -> Batch:
        """Return the batch, padded until S is a multiple of `multiple`."""
        more = -self.labels.shape[1] % multiple
        if not more:
            return self
        fill = {"token_type_ids": 1}  # others 0, as no one attends to padding
        inputs = {n: _lengthened(v, more, fill.get(n, 0)) if n in TEXT else v for n, v in self.inputs.items()}
        return Batch(self.ids, inputs, _lengthened(self.labels, more, IGNORE))

    def _part(self, start: int, stop: int) -> Batch:
        longest = int(self.inputs["attention_mask"][start:stop].sum(1).max())
        inputs = {n: v[start:stop, :longest] if n in TEXT else v[start:stop] for n, v in self.inputs.items()}
        return Batch(self.ids[start:stop], inputs, self.labels[start:stop, :longest])

    def pin_memory(self) -> Batch:
        return Batch(self.ids, {k: v.pin_memory() for k, v in self.inputs.items()}, self.labels.pin_memory())


class Collator(ABC):
    """Turns examples into what a model is trained on:

        picture and prompt | target JSON, stop token | padding
        token_type_ids 0   | 1                       | 1    (see `both_ways`)
        labels -100        | the tokens              | -100

    A family of models says what precedes an answer and what ends it, and how pictures become inputs. A target is never
    cut, and what it holds is text: a literal `<eos>` in it is spelled out, not a special token.

    Args:
        processor: of the model; its tokenizer writes the targets.
        trim: how pictures are cut to their printed area.

    Raises:
        UserError: if the prompt is not UTF-8, or holds what the tokenizer reads as a special token.
    """

    stop: int  # the token that ends an answer
    lead = ""  # what precedes the JSON of an answer
    longest_prefix: int  # tokens that precede an answer, at most
    last: int  # the token that every prefix ends with
    both_ways: int | None = None  # leading prefix tokens that attend in both directions, or None for all of them
    image_token: int  # stands in a prefix for each of a picture's features
    text: str  # picture and prompt, as the processor of transformers takes them
    described: str  # how the model sees a picture, in words

    def __init__(self, processor: Any, prompt: str, trim: Trim = "off") -> None:
        if not is_utf8(prompt):
            raise UserError(f"--prompt {shortened(prompt)!r} is not UTF-8 text")
        self.processor = processor
        self.prompt = prompt
        self.trim: Trim = trim
        # the processor of an exported model, which is not ours, reads them as special tokens too
        if special := next((token for token in _special_tokens(processor.tokenizer) if token in prompt), None):
            raise UserError(f"--prompt {shortened(prompt)!r}: leave {special} out, a special token")

    def shown(self, image: Image.Image) -> Image.Image:
        """Return what of a picture goes to the image processor."""
        return trimmed(image, self.trim)

    @abstractmethod
    def pictures(self, images: Sequence[Image.Image]) -> Pictures:
        """Return what the model gets of B pictures."""

    def pictures_of(self, examples: Sequence[Example]) -> Pictures:
        """Return what the model gets of the pictures of B examples."""
        return self.pictures([example.image for example in examples])

    @abstractmethod
    def prefixes(self, pictures: Mapping[str, torch.Tensor]) -> list[list[int]]:
        """Return the tokens that precede each of B answers: those of its picture and of the prompt."""

    def positions(self, pictures: Mapping[str, torch.Tensor], length: int) -> dict[str, torch.Tensor]:
        """Return {"position_ids": B x S x ...} for S = `length`, or nothing if positions are counted from the first."""
        return {}

    @abstractmethod
    def image_tokens(self, width: int, height: int) -> tuple[int, float]:
        """Return how many tokens a picture of so many pixels takes, and the scale that the model sees it in: 0.5 if it
        is half as wide or half as high as it was. The pixels are those of `shown`."""

    @abstractmethod
    def seen(self, pictures: Pictures) -> Image.Image:
        """Return the picture of a single row of inputs, as the model sees it."""

    def target_ids(self, target: dict) -> list[int]:
        """Return the T tokens to learn: canonical JSON, then the one that ends an answer."""
        tokenizer = self.processor.tokenizer
        text = self.lead + canonical(target)
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [*ids, self.stop]

    def texts(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Return the texts that rows of tokens stand for, without special tokens."""
        return self.processor.tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """Return a training batch."""
        ids, targets = [example.id for example in examples], [example.target for example in examples]
        return self.batch(ids, targets, self.pictures_of(examples))

    def batch(self, ids: list[str], targets: Sequence[dict], pictures: Pictures) -> Batch:
        """Return a training batch of B targets and what is known of their pictures."""
        suffixes = [self.target_ids(target) for target in targets]
        prefixes = self.prefixes(pictures)
        length = max(len(prefix) + len(suffix) for prefix, suffix in zip(prefixes, suffixes))
        shape = (len(ids), length)
        input_ids = torch.full(shape, self.processor.tokenizer.pad_token_id)  # B x S
        labels = torch.full(shape, IGNORE)  # B x S
        attention_mask = torch.zeros(shape, dtype=torch.long)  # B x S
        token_type_ids = torch.ones(shape, dtype=torch.long)  # B x S
        for row, (prefix, suffix) in enumerate(zip(prefixes, suffixes)):
            start, end = len(prefix), len(prefix) + len(suffix)
            input_ids[row, :start] = torch.tensor(prefix)
            token_type_ids[row, :start][: self.both_ways] = 0
            input_ids[row, start:end] = labels[row, start:end] = torch.tensor(suffix)
            attention_mask[row, :end] = 1
        text = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        return Batch(ids, text | self.positions(pictures, length) | pictures, labels)


def _lengthened(value: torch.Tensor, more: int, fill: int = 0) -> torch.Tensor:
    """Return a tensor with so much more of its second dimension."""
    return F.pad(value, (0, 0) * (value.ndim - 2) + (0, more), value=fill) if more else value


def _special_tokens(tokenizer: Any) -> list[str]:
    """Return the texts that a tokenizer reads as control tokens: `<eos>`, `<image>`, but not `<loc0001>`."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return [*tokenizer.all_special_tokens, *added]
