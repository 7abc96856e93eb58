"""Layers compiled by torch.compile, where that pays."""

from __future__ import annotations

import re

import torch

from im2json.model.lora import count_parameters
from im2json.options import ModelOptions

LARGE = 10**9  # weights; below that compiling takes longer than it saves
LENGTHS = 64  # positions: a multiple of this is what a microbatch is padded to where passes are recorded


def pays(wanted: str, model: torch.nn.Module, device: torch.device) -> bool:
    """What --compile or --graphs comes to for this model."""
    return wanted == "on" or (wanted == "auto" and device.type == "cuda" and count_parameters(model)[1] >= LARGE)


def records(options: ModelOptions, model: torch.nn.Module, device: torch.device, precision: str) -> bool:
    """Whether passes are recorded as CUDA graphs: not under fp16's loss scaling, nor with dropout that recomputed
    layers would have to draw again."""
    if device.type != "cuda" or precision == "fp16" or (options.gradient_checkpointing and options.dropout > 0):
        return False
    return pays(options.graphs, model, device)


def compile_layers(model: torch.nn.Module) -> None:
    """Have each layer of both towers compiled when it is first used: the elementwise work between two products then
    takes one kernel. All layers of a tower share what was compiled for the first: once for the first shape that comes,
    and once more for any."""
    torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
    for name, module in model.named_modules():
        if re.search(r"\.layers\.\d+$", name):
            module.compile()
