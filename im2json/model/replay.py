"""The forward and backward pass of a model: as PyTorch launches it, or replayed from CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

from im2json.model.compiled import compile_layers
from im2json.model.memory import free_bytes

# B examples, S positions, D hidden.

HiddenStates = Callable[[Any, dict[str, torch.Tensor]], torch.Tensor]
"""The last hidden states of a model without its LoRA wrapper on a batch's inputs; B x S x D."""


class Forward:
    """Computes the hidden states of a model in training.

    Args:
        hidden_states: of the model's family.
    """

    round_up = 1  # S has to be a multiple of this

    def __init__(self, model: PeftModel, hidden_states: HiddenStates) -> None:
        self.model = model
        self.base: Any = model.get_base_model()
        self.hidden_states = hidden_states

    def __call__(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """B x S x D."""
        return self.hidden_states(self.base, batch)

    def forget(self) -> None:
        """Release the memory that is held from one pass to the next."""

    def pause(self) -> None:
        """Release memory if what is done before the next pass needs it."""


class Replayed(Forward):
    """The same from CUDA graphs, a pair for each shape: the thousands of kernels of a pass are launched at once, where
    a CPU takes longer to launch them than the GPU to run them.

    A shape that is new is run as usual, recorded when it comes for the second time, and replayed from then on. All
    graphs share their memory, as there is always one pass under way. The gradients must exist and stay where they are
    (see training.optimizer.flatten), and a forward pass must be followed by its backward pass.

    Args:
        reserve: bytes to leave for what is done between steps.
    """

    round_up = 64  # so that few shapes occur

    def __init__(self, model: PeftModel, hidden_states: HiddenStates, reserve: float = 0.0) -> None:
        super().__init__(model, hidden_states)
        self.reserve = reserve
        self.stream = torch.cuda.Stream()  # memory can be used again on the stream that it was used on alone
        self.forget()

    def forget(self) -> None:
        self.recorded: dict[torch.Size, _Pass | None] = {}
        self.pool = torch.cuda.MemPool()
        torch.cuda.empty_cache()

    def pause(self) -> None:
        held = sum(segment["total_size"] for segment in self.pool.snapshot())
        if free_bytes() - held < self.reserve:
            self.forget()

    def __call__(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        shape = batch["input_ids"].shape
        if shape not in self.recorded:
            self.recorded[shape] = None
            with self._aside(), torch.cuda.use_mem_pool(self.pool):
                return super().__call__(batch)
        recorded = self.recorded[shape]
        if recorded is None:
            recorded = self.recorded[shape] = self._record(batch)
        for name, value in batch.items():
            recorded.inputs[name].copy_(value)
        return _Replay.apply(self._anchor(), recorded)

    def _record(self, batch: dict[str, torch.Tensor]) -> _Pass:
        inputs = {name: value.clone() for name, value in batch.items()}
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # Other threads load pictures meanwhile, and may do as they like.
        how: Any = dict(pool=self.pool.id, stream=self.stream, capture_error_mode="thread_local")
        with torch.cuda.graph(forward, **how):
            hidden = self.hidden_states(self.base, inputs)  # B x S x D
        change = torch.empty_like(hidden)  # B x S x D
        with torch.cuda.graph(backward, **how):
            hidden.backward(change)
        return _Pass(forward, backward, inputs, hidden.detach(), change)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        present = torch.cuda.current_stream()
        self.stream.wait_stream(present)
        with torch.cuda.stream(self.stream):
            yield
        present.wait_stream(self.stream)

    def _anchor(self) -> torch.Tensor:
        """Asks autograd for a backward pass."""
        return torch.empty(0, device=self.stream.device, requires_grad=True)


@dataclass(eq=False)
class _Pass:
    """The graphs for one shape, and what they read and write."""

    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    inputs: dict[str, torch.Tensor]
    hidden: torch.Tensor  # B x S x D
    change: torch.Tensor  # B x S x D: the gradient that comes back


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, recorded: _Pass) -> torch.Tensor:
        ctx.recorded = recorded
        recorded.forward.replay()
        return recorded.hidden.detach()

    @staticmethod
    def backward(ctx: Any, *change: torch.Tensor) -> tuple[None, None]:
        ctx.recorded.change.copy_(change[0])
        ctx.recorded.backward.replay()
        return None, None


def make_forward(
    model: PeftModel,
    hidden_states: HiddenStates,
    launch: str,
    checkpointing: bool,
    *,
    recordable: bool = True,
    reserve: float = 0.0,
) -> Forward:
    """Return the pass that --launch and --gradient-checkpointing ask for.

    Args:
        hidden_states: of the model's family.
        launch: single, graphs or compiled.
        recordable: whether that pass can be recorded as a CUDA graph at all.
        reserve: as in Replayed.
    """
    if checkpointing:
        base: Any = model.get_base_model()
        base.gradient_checkpointing_enable({"use_reentrant": False})
    if launch == "compiled":
        compile_layers(model)
    # checkpointing saves and sets the state of the random numbers, which cannot be recorded
    recorded = recordable and launch != "single" and not checkpointing and next(model.parameters()).is_cuda
    return Replayed(model, hidden_states, reserve) if recorded else Forward(model, hidden_states)
