"""Kinds of vision-language models. Other modules do not ask which kind they have, but call what `Family` declares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from im2json.data.collate import Collator
from im2json.errors import UserError
from im2json.families.base import Family, Reader
from im2json.families.gemma3 import Gemma3
from im2json.families.paddleocr import PaddleOCR
from im2json.families.paligemma import PaliGemma
from im2json.families.qwen import Qwen, Qwen25
from im2json.families.tiles import Tiles
from im2json.model.base import load_config
from im2json.options import DataOptions, ModelOptions
from im2json.runs import adapter_folder, adapter_usage

_ALL: tuple[Family, ...] = (PaliGemma(), Qwen(), Qwen25(), Gemma3(), Tiles(), PaddleOCR())
FAMILIES = {name: family for family in _ALL for name in family.model_types}
"""By the model_type of a config."""


def family_of(config: Any, name: str = "the model") -> Family:
    """Return the family of a model by its config.

    Args:
        name: what the model is called in an error.

    Raises:
        UserError: if its type or that of its language model is not supported, naming those that are.
    """
    if config.model_type not in FAMILIES:
        raise UserError(f"{name} is of type {config.model_type}, which is not supported: {', '.join(FAMILIES)} are")
    family, text = FAMILIES[config.model_type], config.get_text_config().model_type
    if text not in family.text_types:
        raise UserError(
            f"{name} is of type {config.model_type} with a language model of type {text}, which is not supported. "
            f"Supported there: {', '.join(family.text_types)}"
        )
    return family


def check_adapter(options: ModelOptions) -> None:
    """Refuse an adapter that was trained on a model of another type.

    Raises:
        UserError: naming both types.
    """
    usage = adapter_usage(adapter_folder(Path(options.adapter))) if options.adapter is not None else None
    trained_on = None if usage is None else usage.get("model_type")
    if trained_on is not None and trained_on != (found := load_config(options.model).model_type):
        raise UserError(
            f"--adapter {options.adapter} was trained on a model of type {trained_on}, and --model {options.model} is "
            f"of type {found}: leave --model out, or begin without --adapter"
        )


def collator_of(model: str, options: DataOptions) -> Collator:
    """Return the collator of a model (`tiny`, a folder, or a name on the hub) that a run's options ask for.

    Raises:
        UserError: if there is no such model, it is of no family here, or prompt, options and model do not fit each
            other.
    """
    config = load_config(model)
    family, held = family_of(config, f"--model {model}"), config.get_text_config().max_position_embeddings
    if options.image_tokens is not None and options.image_tokens >= held:
        raise UserError(
            f"--image-tokens {options.image_tokens}: the model holds {held} tokens, prompt and answer included. Give a "
            "smaller number"
        )
    return family.collator(family.load_processor(model, config), options)


def open_collator(model: str, prompt: str, **options: Any) -> Collator:
    """Return the collator of a model for a prompt and other options of DataOptions; raises as `collator_of`."""
    return collator_of(model, DataOptions(prompt=prompt, **options))


__all__ = ["FAMILIES", "Family", "Reader", "check_adapter", "collator_of", "family_of", "open_collator"]
