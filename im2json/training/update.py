"""One optimizer step: forward, backward, sum over processes, clip, step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from tqdm.auto import tqdm

from im2json.data.collate import IGNORE, Batch, Collator
from im2json.errors import UserError
from im2json.model.lora import trained
from im2json.model.loss import summed_loss
from im2json.model.replay import Forward
from im2json.options import TrainOptions
from im2json.training.optimizer import flatten, make_optimizer
from im2json.training.stopping import StopRequest


@dataclass(frozen=True)
class StepOutcome:
    loss: float  # nats per target token, over all processes
    grad_norm: float  # of all LoRA gradients together, before clipping
    stop: bool  # some process was asked to stop
    non_finite: bool  # the loss or a gradient; the optimizer was not touched
    skipped: bool  # fp16 only: a gradient overflowed, the loss scale was halved and the update left out


@dataclass
class Update:
    """Takes optimizer steps."""

    forward: Forward
    parameters: list[torch.nn.Parameter]
    optimizer: Any  # an AcceleratedOptimizer over these parameters
    accelerator: Accelerator
    max_grad_norm: float
    microbatch: int  # examples that go through the model at a time; halved when the GPU's memory runs out

    @classmethod
    def of(cls, forward: Forward, options: TrainOptions, accelerator: Accelerator, microbatch: int) -> Update:
        """Make an Update for the LoRA weights of a model. They and their gradients become views of one tensor."""
        parameters = [flatten(trained(forward.model))]
        optimizer = accelerator.prepare(make_optimizer(parameters, options))
        return cls(forward, parameters, optimizer, accelerator, options.max_grad_norm, microbatch)

    def __call__(
        self,
        batches: list[Batch],
        target_tokens: int,
        stop: StopRequest | None = None,
        inspect: Callable[[], None] | None = None,
    ) -> StepOutcome:
        """Take one step from this process's batches, in parts of at most `microbatch` examples.

        Args:
            target_tokens: of the whole step, over all processes.
            stop: the request that this process may have got. The step passes it on to all processes.
            inspect: called when the gradients are there, before they are clipped.

        Raises:
            torch.OutOfMemoryError: there is no room for a single example.
            RuntimeError: a process was lost. The adapter was not updated.
        """
        loss = self.add_gradients(batches, target_tokens)
        values = torch.stack([loss, loss.new_full((), float(stop is not None and stop.made)), loss.new_ones(())])  # 3
        sum_over_processes(values, self.parameters, self.accelerator)
        if inspect is not None:
            inspect()
        grad_norm = self.accelerator.clip_grad_norm_(self.parameters, self.max_grad_norm)
        assert grad_norm is not None
        # the step's one wait for the device
        loss_value, stops, present, norm_value = torch.cat([values, grad_norm.view(1)]).tolist()
        if present != self.accelerator.num_processes:  # NCCL may give up a collective without saying so
            raise RuntimeError(f"{present:g} of {self.accelerator.num_processes} processes took part in a step")
        scaled = self.accelerator.scaler is not None  # then the scaler handles an overflow of the scaled gradients
        non_finite = not math.isfinite(loss_value) or not (math.isfinite(norm_value) or scaled)
        if not non_finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)  # they are views of one tensor, see optimizer.flatten
        return StepOutcome(loss_value, norm_value, stops > 0, non_finite, scaled and self.optimizer.step_was_skipped)

    def add_gradients(self, batches: list[Batch], target_tokens: int) -> torch.Tensor:
        """Add the gradients of this process's share of a step, and return its share of the loss.

        If the GPU's memory runs out, halve the microbatch for good and begin the step again, with the same dropout.
        No other process needs to know: they meet when the gradients are summed.

        Raises:
            torch.OutOfMemoryError: there is no room for a single example.
        """
        while True:
            try:
                return self._backward(batches, target_tokens)
            except torch.OutOfMemoryError:
                # the largest part that was tried may be smaller than the limit: a short step, or a small --batch-size
                tried = min(self.microbatch, max(len(batch.ids) for batch in batches))
                if tried == 1:
                    raise
            # not in the `except`: until its end the error's traceback keeps the activations
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad.zero_()
            self.forward.forget()
            torch.cuda.empty_cache()
            torch.manual_seed(torch.initial_seed())  # as `seed_dropout` left it
            self.microbatch = (tried + 1) // 2
            tqdm.write(
                f"process {self.accelerator.process_index}: out of memory with {tried} examples at a time: begins the "
                f"step anew and goes on with --microbatch {self.microbatch}"
            )

    def _backward(self, batches: list[Batch], target_tokens: int) -> torch.Tensor:
        """Run forward and backward, microbatch by microbatch.

        The loss of each is a sum, divided by the target tokens of the whole step: the gradients add up to those of the
        mean over all target tokens, however the step was split.
        """
        device = self.accelerator.device
        loss = torch.zeros((), device=device)
        for batch in batches:
            for part in batch.cut(self.microbatch):
                part = part.padded(self.forward.round_up)
                hidden = self.forward(part.to(device).inputs)  # B x S x D
                share = summed_loss(self.forward.base, hidden, part.labels) / target_tokens
                self.accelerator.backward(share)
                loss += share.detach()
        return loss


def sum_over_processes(values: torch.Tensor, parameters: list[torch.nn.Parameter], accelerator: Accelerator) -> None:
    """Sum the gradients and a few values over all processes, in place. values: (n,)

    Nothing else goes over the wire. A process that a short last step left without examples takes part with zeros.
    """
    if accelerator.num_processes > 1:
        for parameter in parameters:
            torch.distributed.all_reduce(parameter.grad)
        torch.distributed.all_reduce(values)


def check_labels(batches: list[Batch], collator: Collator) -> None:
    """Check that a step's labels are the whole target with the stop token at its end, and nothing before it.

    Raises:
        UserError: naming the first example where they are not.
    """
    for batch in batches:
        real = batch.inputs["attention_mask"].bool()  # B x S
        for id, labels, tokens, prefix in zip(batch.ids, batch.labels, real, collator.prefixes(batch.inputs)):
            learned = labels != IGNORE  # S
            inside, suffix = learned[: len(prefix)].any(), tokens[len(prefix) :]
            if inside or not torch.equal(learned[len(prefix) :], suffix) or labels[learned][-1] != collator.stop:
                raise UserError(
                    f"example {id}: its labels are not exactly the target's tokens with the stop token at their end"
                )


def check_gradients(model: PeftModel) -> None:
    """Check that the first step reaches every LoRA layer.

    In a fresh adapter only the second matrix of each pair, and DoRA's magnitudes, have gradients that are not zero.

    Raises:
        UserError: naming the layers that no gradient reaches, which would be saved as if they had been trained.
    """
    telling = [(name, p.grad) for name, p in model.named_parameters() if p.requires_grad and ".lora_A." not in name]
    missing = [name for name, gradient in telling if gradient is None or not gradient.any()]
    if missing:
        raise UserError(
            f"no gradient reaches {len(missing)} of {len(telling)} LoRA matrices, {missing[0]} among them: "
            "leave these layers out with --target-modules"
        )


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Make the step's dropout a function of (seed, step, process): nothing that happens between two steps, such as an
    evaluation or a resume, can change it."""
    torch.manual_seed(hash((seed, step, rank)) & (2**63 - 1))
