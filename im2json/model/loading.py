"""The base with its adapter on one device: what training, evaluating and extracting begin with."""

from __future__ import annotations

import torch
from peft import PeftModel

from im2json.model.base import load_base
from im2json.model.gpu import check_gpu
from im2json.model.lora import add_lora
from im2json.options import ModelOptions


def choose_device() -> torch.device:
    """Return the GPU if there is one, or else the CPU.

    Raises:
        UserError: if this build of torch does not serve the GPU.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    check_gpu()
    return torch.device("cuda")


def load_adapted(options: ModelOptions, precision: str, device: torch.device, seed: int) -> PeftModel:
    """Return the frozen base of these options with LoRA, from --adapter or with new matrices drawn from `seed`.

    Args:
        precision: resolved: bf16, fp16 or fp32.

    Raises:
        UserError: if there is no such base or adapter, or they do not fit each other.
    """
    base = load_base(options.model, precision, options.quant, device, options.dequantize)
    return add_lora(base, options, seed)
