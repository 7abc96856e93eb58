"""Layers compiled by torch.compile."""

from __future__ import annotations

import re

import torch


def compile_layers(model: torch.nn.Module) -> None:
    """Have each module in a list called `layers` compiled when it is first used.

    The elementwise work between two products then takes one kernel. All layers of a tower share what was compiled for
    the first: once for the first shape that comes, and once more for any. Qwen's tower calls its list otherwise; its
    layers wait for the GPU, which cannot be compiled.
    """
    torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
    for name, module in model.named_modules():
        if re.search(r"\.layers\.\d+$", name):
            module.compile()
