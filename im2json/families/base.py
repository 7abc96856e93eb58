"""The questions whose answers differ from one family of models to another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image

from im2json.data.collate import Collator, Pictures
from im2json.data.pictures import on_square
from im2json.errors import UserError
from im2json.model.memory import Sizes
from im2json.options import DataOptions

# B rows, S positions read of each, I image tokens, D hidden, G key/value heads, E head size, V vocabulary.


class Cache(Protocol):
    """Keeps keys and values, and says who attends to whom. Decoding owns it; a reader hands in what is new."""

    causal: bool  # whether a position for which there is no mask sees only itself and those before it

    def update(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep what is new, B x S x G x E, and return what to attend to."""

    def mask(self, window: int | None) -> torch.Tensor | None:
        """Return what is added to scores, B x S x L, or None if `causal` says it all."""


class Reader(Protocol):
    """Reads prefixes and the tokens after them: the model's side of decoding."""

    longest_prefix: int  # positions, at most
    last: int  # the token that every prefix ends with
    stops: list[int]  # tokens that end an answer
    records_prefixes: bool  # whether reading prefixes can be recorded as a CUDA graph
    layers: int
    kv_heads: int
    head_dim: int
    hidden: int
    like: torch.Tensor  # of the dtype and on the device of the computation

    def read_prefixes(self, pictures: Pictures, cache: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Read what precedes the answers to B pictures.

        Returns:
            How many positions each prefix has, and what is added to a position for its rotation; B each.
        """

    def read_tokens(self, tokens: torch.Tensor, rotations: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Return the hidden states of B x S tokens with these rotary positions; B x S x D."""

    def logits(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits that a token is chosen by, and those that its probability is computed from; ... x V."""


class PictureFeatures(NamedTuple):
    """Computes what a language model gets of pictures, which is equally much of each."""

    shape: tuple[int, int]  # I x D
    compute: Callable[[Pictures], torch.Tensor]  # of B pictures: B x I x D


class Family(Protocol):
    """A kind of vision-language model, whatever the size."""

    model_types: Sequence[str]  # of the configs of transformers
    text_types: Sequence[str]  # of the configs of their language models
    tower: str  # found in the name of every module that sees pictures
    records_steps: bool  # whether a training pass can be recorded as a CUDA graph

    def load_processor(self, model: str, config: Any) -> Any:
        """Load the processor of a model with this config: a folder, or a name on the hub.

        Raises:
            UserError: if it cannot be loaded.
        """

    def collator(self, processor: Any, options: DataOptions) -> Collator:
        """Return what lays out pictures, prompts and answers.

        Raises:
            UserError: if the prompt or the model's template does not allow it, or an option means nothing here.
        """

    def hidden_states(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the last hidden states of a microbatch (Batch.inputs), B x S x D."""

    def features(self, model: Any) -> PictureFeatures | None:
        """Return how the features of pictures are computed, or None if they cannot be kept from step to step."""

    def reader(self, model: Any, collator: Collator) -> Reader:
        """Return what reads prefixes and tokens with a model of plain weights."""

    def sizes(self, config: Any, image_tokens: int | None = None) -> Sizes:
        """Return what of a config decides the memory that a run takes, with at most so many tokens for a picture."""

    def hub_layout(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return a model's weights under the names that they have on the hub."""


def refuse(options: DataOptions, **reasons: str) -> None:
    """Refuse options that mean nothing to a family.

    Raises:
        UserError: with the reason.
    """
    for name, reason in reasons.items():
        if (value := getattr(options, name)) != getattr(DataOptions(), name):
            given = "" if value is True else f" {value}"
            raise UserError(f"--{name.replace('_', '-')}{given}: leave it out, {reason}")


def check_processor(files: object, model: str, needed: Mapping[str, tuple[Any, Any]]) -> None:
    """Check that a processor makes the inputs that a model takes.

    Args:
        files: where the processor was loaded from.
        needed: settings that they must share, by name: the processor's value and the model's.

    Raises:
        UserError: for the first that differs.
    """
    for name, (found, wanted) in needed.items():
        if found != wanted:
            raise UserError(
                f"{files}: {name} is {found}, and the model of --model {model} needs {wanted}: take the "
                "processor's files from where the model comes from"
            )


def as_on_hub(weights: Mapping[str, torch.Tensor], names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Return a model's weights under their names on the hub; lm_head only if it is another than the embedding.

    Args:
        names: beginnings of names here, and what they are on the hub.
    """
    (embedding,) = (weight for name, weight in weights.items() if name.endswith("embed_tokens.weight"))
    tied = weights["lm_head.weight"].data_ptr() == embedding.data_ptr()
    named = {}
    for name, weight in weights.items():
        start = next((start for start in names if name.startswith(start)), "")
        if not (tied and name == "lm_head.weight"):
            named[names.get(start, start) + name.removeprefix(start)] = weight
    return named


def own_head(config: Any) -> int:
    """Return the weights of an output layer that is not tied to the embedding, or 0 if it is."""
    text = config.get_text_config()
    return 0 if config.tie_word_embeddings else text.vocab_size * text.hidden_size


class Squares:
    """Shows a model pictures as squares: for collators of a model that sees no other shape."""

    letterbox: bool
    size: tuple[int, int]  # width and height in pixels

    def to_squares(self, processor: Any, letterbox: bool) -> str:
        """Squash pictures to the size of a processor, or pad them before, and return that in words."""
        self.letterbox = letterbox
        self.size = processor.image_processor.size["width"], processor.image_processor.size["height"]
        form = "padded" if letterbox else "squashed"
        return f"a picture of {self.size[0]} x {self.size[1]} pixels, {form} to that square"

    def shown(self, image: Image.Image) -> Image.Image:
        """Return what of a picture goes to the image processor, which squashes it."""
        image = super().shown(image)  # type: ignore[misc]
        return on_square(image) if self.letterbox else image

    def scale(self, width: int, height: int) -> float:
        """Return the scale that a picture of so many pixels is seen in."""
        return min(self.size[0] / width, self.size[1] / height)
