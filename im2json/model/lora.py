"""LoRA on the frozen base: what is trained, how an adapter is read and written, and plain weights with it merged in."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_bnb_weight
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.initialization import no_init_weights

from im2json.errors import UserError, first_line
from im2json.model.norms import fuse_norms
from im2json.options import ModelOptions, language_modules
from im2json.runs import adapter_folder

_LAYER = r".*\.(layers?|blocks)\.\d+\."
"""Matches the beginning of the name of every module inside a layer of either tower."""


def add_lora(base: Any, options: ModelOptions, seed: int) -> PeftModel:
    """Add LoRA matrices (Hu et al. 2021, https://arxiv.org/abs/2106.09685) in fp32, the only trained weights.

    Raises:
        UserError: if --target-modules matches no linear layer, or --adapter is not an adapter of this base.
    """
    torch.manual_seed(seed)
    base.name_or_path = options.model  # what PEFT writes down as the adapter's base
    if options.adapter is not None:
        model = _warm_start(base, options.adapter)
    else:
        config = LoraConfig(
            r=options.r,
            lora_alpha=options.alpha,  # type: ignore[arg-type]
            lora_dropout=options.dropout,
            target_modules=target_modules(base, options.target_modules),
            use_rslora=options.rslora,
            use_dora=options.dora,
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(base, config)
    for parameter in trained(model):
        parameter.data = parameter.data.float()
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and not layer.lora_variant:  # DoRA has a forward pass of its own
            layer.forward = MethodType(_adapted, layer)  # type: ignore[method-assign]
    return model.train()


def _adapted(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Compute a linear layer and its LoRA matrices in the precision of x; PEFT would convert to fp32 and back.

    Fold the scale into the small matrix and the addition into the product, so that tensors as wide as the layer are
    read only once.
    """
    if layer.disable_adapters or layer.merged:
        return type(layer).forward(layer, x)
    (name,) = layer.active_adapters
    down = (layer.lora_A[name].weight * layer.scaling[name]).to(x.dtype)  # r x in
    up = layer.lora_B[name].weight.to(x.dtype)  # out x r
    base, between = layer.base_layer(x), F.linear(layer.lora_dropout[name](x), down)  # ... x out, ... x r
    return torch.addmm(base.flatten(0, -2), between.flatten(0, -2), up.t()).view_as(base)


def target_modules(base: torch.nn.Module, wanted: str) -> list[str] | str:
    """Return --target-modules in PEFT's terms: a list of name endings, or a regular expression over full names.

    Raises:
        UserError: if nothing matches, with names that would.
    """
    # not the output layer: it is tied to the embedding
    modules = ((name, module) for name, module in base.named_modules() if name != "lm_head")
    linear = [name for name, module in modules if isinstance(module, torch.nn.Linear)]
    endings = sorted({name.rsplit(".", 1)[-1] for name in linear})
    if wanted == "language":
        return language_modules(decoder_name(base))
    if wanted == "both":
        inner = sorted({name.rsplit(".", 1)[-1] for name in linear if re.search(_LAYER, name)})
        return rf"{_LAYER}.*\.({'|'.join(inner)})"
    if re.fullmatch(r"[\w.]+(,\s*[\w.]+)*", wanted):
        names = [name.strip() for name in wanted.split(",")]
        missing = [name for name in names if not any(f".{full}".endswith(f".{name}") for full in linear)]
        if missing:
            raise UserError(
                f"--target-modules: no linear layer is named {', '.join(missing)}: there are {', '.join(endings)}"
            )
        _refuse_others(base, wanted, lambda name: any(f".{name}".endswith(f".{each}") for each in names))
        return names
    try:
        pattern = re.compile(wanted)
    except re.error as error:
        raise UserError(f"--target-modules {wanted!r} is not a regular expression: {error}") from error
    if not any(pattern.fullmatch(name) for name in linear):
        raise UserError(f"--target-modules {wanted!r} matches no linear layer: they are named like {linear[-1]}")
    _refuse_others(base, wanted, lambda name: pattern.fullmatch(name) is not None)
    return wanted


def decoder_name(model: Any) -> str:
    """Return the name of a model's stack of decoder layers within it."""
    decoder = model.get_decoder()
    return next(name for name, module in model.named_modules() if module is decoder)


def _refuse_others(base: torch.nn.Module, wanted: str, matches: Callable[[str], bool]) -> None:
    """Refuse names that stand for other layers than linear ones, to which PEFT would add LoRA as well."""
    for name, module in base.named_modules():
        if matches(name) and not isinstance(module, torch.nn.Linear):
            raise UserError(
                f"--target-modules {wanted!r} also matches {name}, which is no linear layer: give a regular expression "
                "that leaves it out, or `both` for every linear layer of both towers"
            )


_UNFIT = (RuntimeError, ValueError, OSError, LookupError, AttributeError, TypeError, SafetensorError, re.error)
"""Raised by PEFT and safetensors where an adapter's files are wrong or belong to another base."""


def _warm_start(base: Any, adapter: str) -> PeftModel:
    folder = adapter_folder(Path(adapter))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")  # those would be left as drawn
            return PeftModel.from_pretrained(base, str(folder), is_trainable=True)
    except torch.OutOfMemoryError:
        raise
    except UserWarning as error:
        raise UserError(f"--adapter {adapter} does not fit this model: it was trained on other layers") from error
    except _UNFIT as error:
        raise UserError(f"--adapter {adapter} does not fit this model: {first_line(error, 2)}") from error


def trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Return the weights that the optimizer updates, in a fixed order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Return the numbers of trained and of all weights. A 4-bit parameter packs two weights into a byte."""
    total = sum(p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in model.parameters())
    return sum(p.numel() for p in trained(model)), total


def write_adapter_weights(model: PeftModel, path: Path) -> None:
    """Write the adapter's weights as PEFT does."""
    save_file({name: value.contiguous() for name, value in _adapter_weights(model).items()}, path)


def read_adapter_weights(model: PeftModel, path: Path) -> None:
    """Overwrite the adapter's weights with those of a file.

    Raises:
        UserError: if the file belongs to an adapter of another shape.
    """
    weights = load_file(path, device=str(next(iter(trained(model))).device))
    if weights.keys() != _adapter_weights(model).keys():  # PEFT would load what fits and leave the rest
        raise UserError(f"{path} does not fit this adapter: it was trained on other layers")
    try:
        set_peft_model_state_dict(model, weights)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit this adapter: {first_line(error, 2)}") from error


def _adapter_weights(model: PeftModel) -> dict[str, torch.Tensor]:
    # Unless told that no embedding is trained, PEFT asks the hub for the base's config to find out.
    return get_peft_model_state_dict(model, save_embedding_layers=False)


@torch.no_grad()
def merged_copy(model: PeftModel, dtype: torch.dtype, *, adapter: bool = True) -> Any:
    """Return a plain model with the weights that the 4-bit layers stand for, and the adapter's unless it is False.

    Text is generated on such copies: they decode several times faster than 4-bit layers, and `model` is not touched.
    That matters: bitsandbytes on a CPU with AVX512-BF16 repacks a 4-bit layer for good in its first forward pass
    without gradients, and later gradients through it are lost. Weights that LoRA does not change are shared.
    """
    base: Any = model.get_base_model()
    # `no_init_weights` affects all threads, which is safe because only this one builds a model. Changing the default
    # dtype would also affect the threads that load pictures, so we do not.
    with torch.device("meta"), no_init_weights():
        copy = type(base)._from_config(_plain_config(base), dtype=torch.get_default_dtype())
    for config in (copy.config, copy.config.text_config, copy.config.vision_config):
        config.dtype = dtype
    weights = {name: _plain_weight(parameter).to(dtype) for name, parameter in _base_parameters(base)}
    for name, layer in base.named_modules() if adapter else ():
        if isinstance(layer, LoraLayer):
            weights[f"{name}.weight"] = _merged(layer, weights[f"{name}.weight"])
    if base.get_output_embeddings().weight is base.get_input_embeddings().weight:
        weights["lm_head.weight"] = weights[f"{decoder_name(base)}.embed_tokens.weight"]
    copy.load_state_dict(weights, strict=True, assign=True)
    copy.tie_weights()
    for name, buffer in base.named_buffers():  # rotary frequencies and position ids are in no state dict
        owner, _, leaf = name.rpartition(".")
        setattr(copy.get_submodule(owner), leaf, buffer)
    copy.requires_grad_(False).eval()
    copy.name_or_path = base.name_or_path
    copy.generation_config = base.generation_config
    fuse_norms(copy)
    return copy


def _merged(layer: Any, weight: torch.Tensor) -> torch.Tensor:
    """A linear layer's weight with its LoRA matrices added, worked out in their precision. PEFT merges into the layers
    of a model, and making one takes longer than this. weight: out x in"""
    changed = layer.get_delta_weight("default").add_(weight)
    if layer.lora_variant:  # DoRA
        changed *= (layer.lora_magnitude_vector["default"].weight / changed.norm(dim=1))[:, None]
    return changed.to(weight.dtype)


def _plain_config(base: Any) -> Any:
    config = deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._attn_implementation = "sdpa"
    config.use_cache = True
    return config


def _base_parameters(base: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield every frozen weight with its name in a base without LoRA."""
    return (
        (name.replace(".base_layer.", "."), parameter)
        for name, parameter in base.named_parameters()
        if "lora_" not in name
    )


def _plain_weight(parameter: torch.nn.Parameter) -> torch.Tensor:
    if parameter.dtype == torch.uint8:
        return dequantize_bnb_weight(parameter, state=parameter.quant_state)  # type: ignore[attr-defined]
    return parameter.detach()
