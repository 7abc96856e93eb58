"""Load a model or a part of it: the embedded one, one from a folder, or one from the hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig
from transformers.utils.logging import disable_progress_bar

from im2json.errors import UserError, first_line
from im2json.files import did_you_mean
from im2json.model.hub import fetch
from im2json.model.norms import fuse_norms
from im2json.runs import HUB_NAME

TINY = Path(__file__).parent / "tiny"
PLENTY = 40 * 2**30  # free bytes
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def locate(model: str) -> str:
    """Return where from_pretrained finds a model: the embedded base's folder for `tiny`, or else the name itself."""
    return str(TINY) if model == "tiny" else model


def load_config(model: str) -> Any:
    """Load the config of a model without its weights.

    Raises:
        UserError: if there is no such model, access to it was not granted, or it does not load.
    """
    return from_pretrained(AutoConfig, model)


def load_base(model: str, precision: str, quant: str, device: torch.device, dequantize: str = "off") -> Any:
    """Load the frozen base on one device, its weights in `precision`; with `nf4`, its linear layers in 4 bits.

    NF4 with double quantisation is QLoRA's storage (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314): 4.127
    bits a weight. Products are computed in `precision`. lm_head and the embedding, which it is tied to, stay whole.

    Raises:
        UserError: if there is no such model, access to it was not granted, or it does not load.
    """
    dtype = DTYPES[precision]
    settings: dict[str, Any] = dict(dtype=dtype, device_map={"": device}, attn_implementation="sdpa")
    if quant == "nf4":
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    disable_progress_bar()
    base: Any = from_pretrained(AutoModelForImageTextToText, model, **settings)
    if getattr(base.config.get_text_config(), "attn_logit_softcapping", None) is not None:
        base.set_attn_implementation({"text_config": "eager"})  # PaliGemma 2 caps its scores, which sdpa leaves out
    if quant == "nf4" and (plentiful(base, dtype) if dequantize == "auto" else dequantize == "on"):
        base = base.dequantize(dtype)
    base.requires_grad_(False)
    fuse_norms(base)
    base.config.use_cache = False
    return base


def positions(model: Any) -> int:
    """Return how many tokens, the prefix included, the model can hold."""
    return model.config.get_text_config().max_position_embeddings


def load_positions(model: str) -> int:
    """Return the `positions` of a model without loading its weights.

    Raises:
        UserError: if there is no such model, access to it was not granted, or it does not load.
    """
    return load_config(model).get_text_config().max_position_embeddings


def plentiful(model: torch.nn.Module, dtype: torch.dtype) -> bool:
    """Return whether there is memory to spare for a model's 4-bit weights in a larger dtype: on a GPU for a few billion
    of them in 16 bits, on a CPU a small part of what is free."""
    packed = [parameter for parameter in model.parameters() if parameter.dtype == torch.uint8]
    if packed and packed[0].is_cuda:
        return torch.cuda.mem_get_info(packed[0].device)[0] > PLENTY
    return sum(2 * weight.numel() for weight in packed) * dtype.itemsize < psutil.virtual_memory().available / 10


def resolve_precision(precision: str, device: torch.device) -> str:
    """Return the precision that `auto` stands for on this device, or the given one if it is possible there.

    Raises:
        UserError: for fp16 on a CPU, which has no loss scaling there and would overflow in silence.
    """
    if precision == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16 needs a GPU: on a CPU use --precision fp32, or bf16 where it is fast")
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"--precision bf16: {torch.cuda.get_device_name(device)} has no bf16: use --precision fp16")
    if precision != "auto":
        return precision
    if device.type == "cpu":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


_UNLOADABLE = (OSError, ValueError, KeyError, RuntimeError, AttributeError, TypeError, SafetensorError)
"""Raised by transformers, tokenizers and safetensors where a model's files are not what they should be."""


def from_pretrained(kind: Any, model: str, **settings: Any) -> Any:
    """Call from_pretrained of a class of transformers for `tiny`, a folder or a name on the hub.

    Raises:
        UserError: if there is no such model, access to it was not granted, or it does not load.
    """
    path = locate(model)
    local = Path(path).is_dir()
    if not local:
        if Path(path).exists():
            raise UserError(f"--model {model}: this is a file; name the folder that holds the model")
        if not re.fullmatch(HUB_NAME, path):
            near = did_you_mean(Path(path))
            raise UserError(
                f"--model {model}: no such folder{near}, and not a name on the hub (owner/name); `tiny` is embedded"
            )
        fetch(model, "config.json", f"--model {model}")  # transformers would try many files, and wrap the reason
    try:
        return _complete(kind, path, **settings)
    except torch.OutOfMemoryError:
        raise
    except _UNLOADABLE as error:
        what = "the folder does" if local else "what the hub has (or gave before the network failed) does"
        raise UserError(
            f"--model {model}: {what} not load as a model with its processor: {first_line(error, 2)}"
        ) from error


def _complete(kind: Any, path: str, **settings: Any) -> Any:
    """Call from_pretrained, but refuse a model whose files lack weights, which transformers would draw at random."""
    if kind is not AutoModelForImageTextToText:
        return kind.from_pretrained(path, **settings)
    with_report: Any = kind.from_pretrained(path, output_loading_info=True, **settings)
    loaded, report = with_report
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    missing = sorted(set(report["missing_keys"]) - ({"lm_head.weight"} if tied else set()))
    if missing:
        raise UserError(f"its files lack {len(missing)} weights, {missing[0]} among them")
    return loaded
