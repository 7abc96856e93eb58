"""The loss on target tokens. Training and tests take it by the same function, `summed_loss`."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from im2json.data.collate import IGNORE

# B examples, S positions, N label positions of a microbatch, D hidden, V vocabulary, C label positions of a chunk.
CHUNK = 512
SCALE = 2.0**10
"""In fp16, so that it keeps probabilities down to 6e-11."""


def summed_loss(model: Any, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy summed over the target tokens of a microbatch, in nats.

    It is summed and not averaged: the caller divides once by the target tokens of the whole step, so that any split
    into microbatches and processes gives the same gradient.

    Args:
        model: with or without LoRA.
        hidden: the last hidden states, B x S x D (see families).
        labels: B x S, -100 where nothing is to be learned. On the CPU, looking for the others waits for no GPU.
    """
    positions, targets = (found.to(hidden.device) for found in label_positions(labels))
    predicting = hidden.flatten(0, 1).index_select(0, positions)  # N x D
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return _ChunkedCrossEntropy.apply(predicting, model.get_output_embeddings().weight, targets, cap)


def label_positions(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where the hidden state predicts a target token, counted through all rows, and that token; (N,) each."""
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORE).flatten()  # position s predicts token s + 1
    positions = (following != IGNORE).nonzero().squeeze(1)  # N
    return positions, following[positions]


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of hidden @ weight.T, with logits for C positions at a time.

    Over PaliGemma's 257,216 words a step's logits and their gradient would take gigabytes. As the weight is frozen, the
    gradient of the hidden states is all that is wanted, and it is known as soon as the logits are (as in Liger's fused
    linear cross-entropy, https://arxiv.org/abs/2410.10989): they need no second product in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, cap: float | None
    ) -> torch.Tensor:
        """Return the summed loss of hidden (N, D), weight (V, D) and targets (N,), with PaliGemma 2's `cap`."""
        loss = torch.zeros((), device=hidden.device)
        scale = SCALE if weight.dtype == torch.float16 else 1.0
        gradients = []
        for states, wanted in zip(hidden.split(CHUNK), targets.split(CHUNK)):
            logits = F.linear(states, weight)  # C x V
            if cap is not None:
                logits = logits.float().div_(cap).tanh_().mul_(cap)
            wanted = wanted.unsqueeze(1)  # C x 1
            logs = F.log_softmax(logits, 1, dtype=torch.float32)  # C x V
            right = logs.gather(1, wanted)  # C x 1
            loss -= right.sum()
            if not ctx.needs_input_grad[0]:
                continue
            # The loss's change with the logits: the softmax, less 1 where the target is. Of a softmax near 1 that would
            # leave nothing in 16 bits, so it is worked out apart.
            change = torch.exp(logs.add_(math.log(scale)) if scale != 1 else logs, out=torch.empty_like(logits))
            change.scatter_(1, wanted, right.expm1().mul_(scale).to(change.dtype))
            if cap is not None:
                change.mul_(1 - (logits / cap).square())
            gradients.append((change.to(weight.dtype) @ weight).float() / scale)  # C x D
        ctx.dtype = hidden.dtype
        ctx.save_for_backward(*([torch.cat(gradients)] if gradients else []))
        return loss

    @staticmethod
    def backward(ctx: Any, *change: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * change[0]).to(ctx.dtype), None, None, None
