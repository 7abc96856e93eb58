"""The forward and backward pass of a microbatch: as PyTorch runs it, or replayed as a CUDA graph."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from peft import PeftModel

from im2json.data.collate import IGNORE, Batch
from im2json.model.compiled import LENGTHS, records
from im2json.model.loss import label_positions, loss_at
from im2json.options import ModelOptions

# B examples, S positions, N label positions.
PLACES = 1024  # N is padded to a multiple of this, and S to one of LENGTHS, so that few shapes occur
MAX_GRAPHS = 24


class Microstep:
    """Adds the gradients of a microbatch's loss to those that are there; returns the loss, detached."""

    def __init__(self, model: PeftModel, accelerator: Accelerator) -> None:
        self.model = model
        self.accelerator = accelerator

    def __call__(self, batch: Batch, target_tokens: int) -> torch.Tensor:
        """The summed loss of the microbatch over the target tokens of the whole step."""
        places, targets = label_positions(batch.labels)
        inputs = {**batch.inputs, "places": places, "targets": targets}
        device = self.accelerator.device
        return self.run({name: value.to(device, non_blocking=True) for name, value in inputs.items()}, target_tokens)

    def run(self, inputs: dict[str, torch.Tensor], target_tokens: int | torch.Tensor) -> torch.Tensor:
        places, targets = inputs["places"], inputs["targets"]
        with self.accelerator.autocast():
            loss = loss_at(self.model, inputs, places, targets) / target_tokens
        self.accelerator.backward(loss)
        return loss.detach()

    def forget(self) -> None:
        """Give back the memory that is held from one pass to the next."""


@dataclass
class Recorded:
    """A pass over inputs of one shape, which lie where the graph reads them."""

    graph: torch.cuda.CUDAGraph
    inputs: dict[str, torch.Tensor]
    loss: torch.Tensor


class GraphedMicrostep(Microstep):
    """The same from CUDA graphs, one for each shape: thousands of kernels are then launched at once, where a CPU would
    need longer to launch them than the GPU to run them.

    Shapes are made few by padding, which changes no result. All graphs share their memory, as only one runs at a time.
    The gradients must be there, and stay where they are (see optimizer.flatten).
    """

    def __init__(self, model: PeftModel, accelerator: Accelerator) -> None:
        super().__init__(model, accelerator)
        self.recorded: dict[tuple, Recorded] = {}
        self.pool = torch.cuda.graph_pool_handle()
        self.target_tokens = torch.ones((), device=accelerator.device)

    def __call__(self, batch: Batch, target_tokens: int) -> torch.Tensor:
        inputs = padded(batch)
        shape = (*inputs["input_ids"].shape, *inputs["places"].shape)
        if shape not in self.recorded and len(self.recorded) >= MAX_GRAPHS:
            return super().__call__(batch, target_tokens)
        self.target_tokens.fill_(target_tokens)
        if shape not in self.recorded:
            self.recorded[shape] = self.record(inputs)
        recorded = self.recorded[shape]
        for name, value in inputs.items():
            recorded.inputs[name].copy_(value, non_blocking=True)
        recorded.graph.replay()
        return recorded.loss.clone()

    def record(self, inputs: dict[str, torch.Tensor]) -> Recorded:
        """Capture a pass. The run that has to come before, on a stream of its own, leaves gradients and random numbers
        as they were."""
        device = self.accelerator.device
        static = {name: value.to(device) for name, value in inputs.items()}
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        kept, state = [grad.clone() for grad in grads], torch.cuda.get_rng_state(device)
        from torch._inductor.cudagraph_trees import _use_cuda_memory_pool_manager  # takes seconds to import

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        # in the graphs' memory as soon as there is some, or it would be needed twice
        ours = _use_cuda_memory_pool_manager(torch.cuda.current_device(), self.pool, side)
        with torch.cuda.stream(side), ours if self.recorded else nullcontext():
            self.run(static, self.target_tokens)
        torch.cuda.current_stream().wait_stream(side)
        for grad, value in zip(grads, kept):
            grad.copy_(value)
        del kept
        torch.cuda.set_rng_state(state, device)
        torch.cuda.empty_cache()  # what the first such run has used is needed again, but by the graphs
        graph = torch.cuda.CUDAGraph()
        loss = torch.zeros((), device=device)
        with torch.cuda.graph(graph, pool=self.pool):
            loss.copy_(self.run(static, self.target_tokens))
        return Recorded(graph, static, loss)

    def forget(self) -> None:
        """Give the graphs' memory back; they are recorded again when they are needed."""
        self.recorded.clear()
        self.pool = torch.cuda.graph_pool_handle()
        torch.cuda.empty_cache()


def padded(batch: Batch) -> dict[str, torch.Tensor]:
    """A microbatch's inputs, and the places and tokens of its labels, padded to shapes that come again."""
    places, targets = label_positions(batch.labels)
    more = -batch.labels.shape[1] % LENGTHS
    width = batch.labels.shape[1]
    inputs = {name: value for name, value in batch.inputs.items() if name != "pixel_values"}
    inputs = {name: F.pad(value, (0, more), value=int(name == "token_type_ids")) for name, value in inputs.items()}
    places = places + places // width * more  # counted through rows that are longer now
    extra = -len(places) % PLACES
    return {
        **inputs,
        "pixel_values": batch.inputs["pixel_values"],
        "places": F.pad(places, (0, extra)),
        "targets": F.pad(targets, (0, extra), value=IGNORE),
    }


def make_microstep(model: PeftModel, accelerator: Accelerator, options: ModelOptions) -> Microstep:
    """Graphs where --compile says so and they can be."""
    graphs = records(options, model, accelerator.device, accelerator.mixed_precision)
    return (GraphedMicrostep if graphs else Microstep)(model, accelerator)
