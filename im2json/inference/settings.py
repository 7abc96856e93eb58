"""How answers are written: limits, precision, and what they are held to and checked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from im2json.data.collate import Collator
from im2json.inference.constrain import Grammar
from im2json.model.base import DTYPES, positions
from im2json.options import TrainConfig
from im2json.scoring.checks import SumCheck
from im2json.scoring.schema import Schema


@dataclass(frozen=True)
class DecodeSettings:
    """What decides an answer besides model and picture."""

    max_new_tokens: int | Sequence[int]  # of every answer, or of each example of the split that is evaluated
    batch_size: int | Literal["auto"] = "auto"  # answers written at a time, per process
    dtype: torch.dtype = torch.float32  # of the merged copy that writes them
    grammar: Grammar | None = None  # --constrain
    checks: Sequence[SumCheck] = ()  # --check-sum

    @classmethod
    def of(
        cls,
        config: TrainConfig,
        precision: str,
        model: torch.nn.Module,
        collator: Collator,
        max_new_tokens: int,
        schema: tuple[Schema, str] | None,
        checks: Sequence[SumCheck],
    ) -> DecodeSettings:
        """Return the settings that a run's options ask for.

        Args:
            precision: resolved: bf16, fp16 or fp32.
            model: with or without LoRA.
            max_new_tokens: the longest answer wanted. The model's own limit may be lower.
            schema: with --constrain the schema, and what it is called in an error.

        Raises:
            UserError: if answers cannot be held to the schema.
        """
        grammar = None
        if schema is not None:
            vocabulary = model.get_output_embeddings().out_features  # type: ignore[operator]
            grammar = Grammar(
                schema[0], collator.processor.tokenizer, vocabulary, schema[1], collator.stop, collator.lead
            )
        limit = min(max_new_tokens, positions(model) - collator.longest_prefix)
        return cls(limit, config.decode.eval_batch_size, DTYPES[precision], grammar, checks)
