"""Whether the GPU at hand can do what is asked, found out before anything is loaded."""

from __future__ import annotations

import re

import torch

from im2json.errors import UserError

LAST_FOR_OLD_GPUS = "pip install torch --index-url https://download.pytorch.org/whl/cu126"
"""Up to torch 2.14 the wheels with CUDA 12.6 serve Pascal and Volta; those with CUDA 13 begin with Turing (7.5)."""


def check_gpu() -> None:
    """Refuse a GPU that this build of torch has no code for: its first kernel would fail, or the wrong one run.

    Raises:
        UserError: naming the GPU, its compute capability, and the build that serves it.
    """
    built = torch.cuda.get_arch_list()
    if not any(arch.startswith("sm_") for arch in built):  # AMD's are named otherwise
        return
    capability = torch.cuda.get_device_capability()
    if any(_serves(arch, capability) for arch in built):
        return
    old = capability < (7, 5)
    advice = f"the last torch wheels for it are those with CUDA 12.6: {LAST_FOR_OLD_GPUS}" if old else "update torch"
    raise UserError(
        f"{torch.cuda.get_device_name()} (compute capability {capability[0]}.{capability[1]}) is not served by torch "
        f"{torch.__version__}, which is built for {', '.join(built)}: {advice}"
    )


def _serves(arch: str, capability: tuple[int, int]) -> bool:
    """Return whether code for `arch`, like sm_86 or compute_120, runs on a GPU: compiled code does on later GPUs of the
    same generation, PTX on all later ones, and code with a letter (sm_90a) on no other."""
    match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", arch)
    if match is None:
        return False
    kind, major, minor, letter = match.groups()
    built = (int(major), int(minor))
    if letter:
        return capability == built
    return built <= capability and (kind == "compute" or built[0] == capability[0])


def precision_note(wanted: str, precision: str) -> str | None:
    """Return a line on what to know of a computation in fp16; None for other precisions."""
    if precision != "fp16":
        return None
    why = f"{torch.cuda.get_device_name()} has no bf16: " if wanted == "auto" else ""
    return (
        f"{why}--precision fp16: the model computes in fp16 with a scaled loss, LoRA stays in fp32. That keeps "
        "gradients in range, not activations: Gemma was trained in bf16, and should one exceed fp16's 65,504, the loss "
        "is not finite and the run stops; --precision fp32 is what helps then"
    )
