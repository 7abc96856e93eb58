"""The optimizer and its learning rate."""

from __future__ import annotations

import math

import bitsandbytes as bnb
import torch

from im2json.options import TrainOptions


def flatten(parameters: list[torch.nn.Parameter]) -> torch.nn.Parameter:
    """One parameter of which the given ones, and their gradients, become views: hundreds of LoRA matrices are then
    updated, clipped, set to zero and summed over processes by one kernel each. (n,), in fp32."""
    flat = torch.nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in parameters]))
    flat.grad = torch.zeros_like(flat)
    start = 0
    for parameter in parameters:
        end = start + parameter.numel()
        parameter.data = flat.data[start:end].view_as(parameter)
        parameter.grad = flat.grad[start:end].view_as(parameter)
        start = end
    return flat


def make_optimizer(parameters: list[torch.nn.Parameter], options: TrainOptions) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) over the LoRA weights.

    With 8 bits its two moments are kept in blocks of 256 values (Dettmers et al. 2022,
    https://arxiv.org/abs/2110.02861), for tensors of at least 4,096 elements; paged, they move to the CPU's memory
    when the GPU's runs out. On a CPU paging is plain memory.
    """
    kind = {
        "paged_adamw_8bit": bnb.optim.PagedAdamW8bit,
        "adamw_8bit": bnb.optim.AdamW8bit,
        "adamw": torch.optim.AdamW,
    }[options.optimizer]
    return kind(parameters, lr=options.lr, weight_decay=options.weight_decay)


def learning_rate(step: int, total: int, options: TrainOptions) -> float:
    """The rate of the update after `step` of `total` updates: linear warmup, then the schedule, which would reach 0
    one step after the last."""
    warmup = math.ceil(options.warmup * total)
    if step < warmup:
        return options.lr * (step + 1) / warmup
    progress = (step - warmup) / max(total - warmup, 1)  # 0 to below 1
    factor = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "constant": 1.0,
    }[options.schedule]
    return options.lr * factor


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
