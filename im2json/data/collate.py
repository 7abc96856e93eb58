"""Examples in, batches out: where the prefix ends and what is learned is decided here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import PaliGemmaProcessor

from im2json.data.example import Example
from im2json.data.pictures import on_square
from im2json.errors import UserError
from im2json.jsontext import canonical
from im2json.text import is_utf8, shortened

# B examples, S positions, P prefix positions (image tokens, BOS, prompt and newline), T target tokens with EOS.
IGNORE = -100


@dataclass(frozen=True)
class Batch:
    """A microbatch, padded on the right."""

    ids: list[str]
    # input_ids, attention_mask, token_type_ids: B x S; and of the pictures, pixel_values: B x 3 x H x W, or what the
    # tower makes of them, image_features: B x I x D
    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor  # B x S

    def to(self, device: torch.device) -> Batch:
        inputs = {name: value.to(device, non_blocking=True) for name, value in self.inputs.items()}
        return Batch(self.ids, inputs, self.labels.to(device, non_blocking=True))

    def cut(self, most: int) -> list[Batch]:
        """Itself in parts of at most `most` examples, each padded no further than its longest."""
        if len(self.ids) <= most:
            return [self]
        return [self._part(start, start + most) for start in range(0, len(self.ids), most)]

    def padded(self, multiple: int) -> Batch:
        """Itself with S a multiple of this."""
        more = -self.labels.shape[1] % multiple
        if not more:
            return self
        fill = {"token_type_ids": 1}  # others 0, which is the padding token's id as well
        inputs = {n: v if v.ndim > 2 else F.pad(v, (0, more), value=fill.get(n, 0)) for n, v in self.inputs.items()}
        return Batch(self.ids, inputs, F.pad(self.labels, (0, more), value=IGNORE))

    def _part(self, start: int, stop: int) -> Batch:
        longest = int(self.inputs["attention_mask"][start:stop].sum(1).max())
        inputs = {name: v[start:stop] if v.ndim > 2 else v[start:stop, :longest] for name, v in self.inputs.items()}
        return Batch(self.ids[start:stop], inputs, self.labels[start:stop, :longest])

    def pin_memory(self) -> Batch:
        return Batch(self.ids, {k: v.pin_memory() for k, v in self.inputs.items()}, self.labels.pin_memory())


class Collator:
    """Turns examples into PaliGemma's layout, the same tokens as PaliGemmaProcessor with a suffix makes:

        <image> x 256, BOS, prompt, newline | target JSON, EOS | padding
        token_type_ids 0 (both directions)  | 1 (causal)       | 1
        labels -100                         | the tokens       | -100

    A target is never cut, and what it holds is text: a literal `<eos>` in it is spelled out, not a special token.
    """

    def __init__(self, processor: PaliGemmaProcessor, prompt: str, letterbox: bool = False) -> None:
        if not is_utf8(prompt):
            raise UserError(f"--prompt {shortened(prompt)!r} is not UTF-8 text")
        self.processor = processor
        self.prompt = prompt
        self.letterbox = letterbox
        tokenizer = processor.tokenizer
        # the processor of an exported model, which is not ours, reads them as special tokens too
        if special := next((token for token in _special_tokens(tokenizer) if token in prompt), None):
            raise UserError(f"--prompt {shortened(prompt)!r}: leave {special} out, a special token")
        image_tokens = processor.image_token * processor.image_seq_length
        prefix = tokenizer(f"{image_tokens}{tokenizer.bos_token}{prompt}\n", add_special_tokens=False)
        self.prefix_ids: list[int] = prefix["input_ids"]  # P

    def target_ids(self, target: dict) -> list[int]:
        """The tokens to learn: canonical JSON, then EOS; T of them."""
        tokenizer = self.processor.tokenizer
        ids = tokenizer(canonical(target), add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [*ids, tokenizer.eos_token_id]

    def texts(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """The texts that rows of tokens stand for, without EOS and other special tokens."""
        return self.processor.tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def pixels(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Pictures squashed to the square that the tower sees, or with `letterbox` on white; B x 3 x H x W."""
        shown = [on_square(image) if self.letterbox else image for image in images]
        return self.processor.image_processor(shown, return_tensors="pt")["pixel_values"]

    def pictures(self, examples: Sequence[Example]) -> torch.Tensor:
        """`pixels` of examples."""
        return self.pixels([example.image for example in examples])

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """A training batch."""
        ids, targets = [example.id for example in examples], [example.target for example in examples]
        return self.batch(ids, targets, pixel_values=self.pictures(examples))

    def batch(self, ids: list[str], targets: Sequence[dict], **pictures: torch.Tensor) -> Batch:
        """A training batch of B targets and what is known of their pictures, see Batch.inputs."""
        suffixes = [self.target_ids(target) for target in targets]
        start = len(self.prefix_ids)
        shape = (len(ids), start + max(map(len, suffixes)))
        input_ids = torch.full(shape, self.processor.tokenizer.pad_token_id)  # B x S
        labels = torch.full(shape, IGNORE)  # B x S
        attention_mask = torch.zeros(shape, dtype=torch.long)  # B x S
        token_type_ids = torch.ones(shape, dtype=torch.long)  # B x S
        input_ids[:, :start] = torch.tensor(self.prefix_ids)
        token_type_ids[:, :start] = 0
        for row, suffix in enumerate(suffixes):
            end = start + len(suffix)
            input_ids[row, start:end] = labels[row, start:end] = torch.tensor(suffix)
            attention_mask[row, :end] = 1
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        return Batch(ids, inputs | pictures, labels)

    def prefixes(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """What generation starts from, for pictures as `pixels` makes them. All prefixes are equally long, so nothing
        is padded."""
        input_ids = torch.tensor(self.prefix_ids).repeat(len(pixels), 1)  # B x P
        return {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "token_type_ids": torch.zeros_like(input_ids),
            "pixel_values": pixels,
        }


def _special_tokens(tokenizer: Any) -> list[str]:
    """Return the texts that a tokenizer reads as control tokens: `<eos>`, `<image>`, but not `<loc0001>`."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return [*tokenizer.all_special_tokens, *added]
