"""The questions whose answers differ from one family of models to another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from im2json.data.collate import Collator, Pictures
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
    tower: str  # found in the name of every module that sees pictures
    records_steps: bool  # whether a training pass can be recorded as a CUDA graph

    def load_processor(self, model: str) -> Any:
        """Load the processor of a model: a folder, or a name on the hub.

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
