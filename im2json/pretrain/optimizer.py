"""Muon for the towers' matrices, AdamW for the rest.

Muon: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

from im2json.pretrain.model import Reader

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of a quintic whose iteration drives singular values to 1


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest matrices with orthonormal rows or columns, roughly. (N, rows, columns), bfloat16 on CUDA."""
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT  # N x rows x rows
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised. All matrices of a shape go through one Newton-Schulz iteration together."""

    def __init__(self, matrices: list[nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape[matrix.shape].append(matrix)
            for (rows, columns), matrices in by_shape.items():
                updates = orthogonalise(self._directions(matrices, group["momentum"]))  # N x rows x columns
                scale = max(1.0, rows / columns) ** 0.5
                torch._foreach_add_(matrices, list(updates.unbind()), alpha=-group["lr"] * scale)

    def _directions(self, matrices: list[nn.Parameter], momentum: float) -> Tensor:
        gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]
        for matrix in matrices:
            if not self.state[matrix]:
                self.state[matrix]["momentum"] = torch.zeros_like(matrix)
        averages = [self.state[matrix]["momentum"] for matrix in matrices]
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        return torch.stack(torch._foreach_lerp(gradients, averages, momentum))  # Nesterov's


def is_quantised(name: str, module: nn.Module) -> bool:
    """Whether QLoRA holds the module's weight in NF4: all linear layers but the tied head."""
    return isinstance(module, nn.Linear) and not name.endswith("lm_head")


def tower_matrices(reader: Reader) -> dict[str, nn.Parameter]:
    """Name -> weight of every linear layer within the two towers: what Muon trains."""
    return {
        name: module.weight
        for name, module in reader.model.named_modules()
        if is_quantised(name, module) and ".layers." in name
    }


def build_optimizers(reader: Reader, matrix_lr: float, other_lr: float) -> list[torch.optim.Optimizer]:
    """Muon and AdamW, covering every parameter once. Each group keeps its peak rate under `peak`."""
    matrices = list(tower_matrices(reader).values())
    held = {id(matrix) for matrix in matrices}
    others = [parameter for parameter in reader.parameters() if id(parameter) not in held]
    fused = others[0].is_cuda
    optimizers = [
        Muon(matrices, matrix_lr),
        torch.optim.AdamW(others, other_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=fused),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def set_rate(optimizers: list[torch.optim.Optimizer], progress: float) -> float:
    """Linear warmup over 2 % of the run, then the peak, then a linear decay to 0 over the last 60 %."""
    factor = min(1.0, progress / 0.02 + 0.02, max(0.0, (1 - progress) / 0.6))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
    return factor
