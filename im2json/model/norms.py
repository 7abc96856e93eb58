"""RMS norms, computed by PyTorch's own kernel."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm


def fuse_norms(model: torch.nn.Module) -> None:
    """Have RMS norms computed in one kernel, where transformers launches up to nine. Their weights must stay frozen."""
    for norm in model.modules():
        if isinstance(norm, GemmaRMSNorm | Gemma2RMSNorm | Gemma3RMSNorm):
            norm.scale = 1.0 + norm.weight.float()  # no buffer: models stay on the device that they are loaded on
            norm.forward = MethodType(_gemma_norm, norm)  # type: ignore[method-assign]
        elif hasattr(norm, "variance_epsilon"):  # as in Llama, and in Qwen since
            norm.forward = MethodType(_norm, norm)  # type: ignore[method-assign]


def _gemma_norm(norm: Any, x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x.float(), x.shape[-1:], norm.scale, norm.eps).type_as(x)


def _norm(norm: Any, x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon).type_as(x)  # autocast would return fp32
