"""How a training step is carried out: launch mode, gradient checkpointing and microbatch. Its result is the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from im2json.data.order import even
from im2json.model.memory import MARGIN, Forecast, Load, Setting, Sizes, forecast, most_that_fit
from im2json.options import TrainConfig

MICROBATCH_ON_CPU = 4  # examples
"""`--microbatch auto` on a CPU: more would not be faster."""
RECORDED = 1.5
"""What recorded passes reserve, relative to what they use: graphs of different shapes do not share every block."""
ENOUGH = 4096  # positions of a microbatch that keep a GPU busy, where it need not wait for launches
LONG_RUN, LONG_UNRECORDED = 8192, 2048
"""Examples after which compiling has paid for itself: beside recorded passes, and beside launches one by one."""
LARGE = 1024  # hidden size of a language model whose layers are worth compiling


@dataclass(frozen=True)
class Strategy:
    """How a training step is carried out."""

    launch: str  # single, graphs or compiled
    checkpointing: bool  # of gradients
    microbatch: int  # examples per forward and backward pass


@dataclass(frozen=True)
class Workload:
    """What a run computes, and on what. The best strategy follows from it."""

    config: TrainConfig
    sizes: Sizes  # of the model
    setting: Setting  # of the run, apart from what the strategy decides
    target_lengths: Sequence[int]  # tokens, of the training examples
    longest_target: int  # tokens, of all splits
    prefix: int  # positions of picture and prompt
    eval_batch: int  # answers written at a time
    max_new_tokens: int  # of an answer
    processes: int
    steps: int  # of the whole run
    free_bytes: float | None  # of the GPU's memory; None on a CPU
    recordable: bool = True  # whether a pass can be recorded as a CUDA graph

    @property
    def share(self) -> int:
        """A process's examples of a step."""
        return -(-self.config.train.batch_size // self.processes)

    def forecast(self, strategy: Strategy) -> Forecast:
        """Return the peak of the memory in parts, with the longest examples in one microbatch."""
        longest = sorted(self.target_lengths)[-strategy.microbatch :]
        load = Load(
            strategy.microbatch,
            self.prefix + longest[-1],
            sum(longest),
            self.eval_batch,
            self.prefix + self.max_new_tokens,
        )
        compiled = strategy.launch == "compiled"
        setting = replace(self.setting, checkpointing=strategy.checkpointing, compiled=compiled)
        return forecast(self.sizes, setting, load)


def choose_strategy(work: Workload) -> Strategy:
    """Return the strategy that the options ask for; what they leave to `auto` is chosen by device and free memory."""
    options, train, share = work.config.model, work.config.train, work.share
    given = None if isinstance(train.microbatch, str) else min(train.microbatch, share)
    if work.free_bytes is None:
        return Strategy(
            "compiled" if options.launch == "compiled" else "single",
            options.gradient_checkpointing == "on",
            given or min(share, MICROBATCH_ON_CPU),
        )
    launch = _launch(work)

    def needs(microbatch: int, checkpointing: bool) -> float:
        # LoRA's weights are in memory already, so this asks for a little more than the step takes
        parts = work.forecast(Strategy(launch, checkpointing, microbatch))
        return parts.lora + parts.step * (1.0 if launch == "single" or checkpointing else RECORDED)

    checkpointing = options.gradient_checkpointing == "on"
    if options.gradient_checkpointing == "auto":
        checkpointing = needs(given or 1, False) > MARGIN * work.free_bytes
    if given is not None:
        microbatch = given
    else:
        most = share if launch == "single" or checkpointing else _enough(work)
        microbatch = most_that_fit(even(share, most), lambda size: needs(size, checkpointing), work.free_bytes)
    return Strategy("single" if checkpointing and launch == "graphs" else launch, checkpointing, microbatch)


def strategy_note(strategy: Strategy, work: Workload) -> str | None:
    """Return a line on what was chosen, or None on a CPU where nothing was."""
    share = work.share
    if work.free_bytes is None:
        chosen = work.config.train.microbatch == "auto"
        note = f"--microbatch auto: {strategy.microbatch} of a step's {share} examples a process, on a CPU"
        return note if chosen else None
    return (
        f"a step's {share} examples {strategy.microbatch} at a time, "
        f"{'' if strategy.checkpointing else 'no '}gradient checkpointing, launch {strategy.launch}: "
        f"{work.forecast(strategy).step / 2**30:.1f} GiB beside the model are forecast; "
        f"{work.free_bytes / 2**30:.1f} are free"
    )


def _launch(work: Workload) -> str:
    """Return the launch mode on a GPU. `auto` compiles large models in long runs, and otherwise records graphs where
    the family allows it."""
    wanted, recorded = work.config.model.launch, "graphs" if work.recordable else "single"
    if wanted == "auto":
        long = work.steps * work.config.train.batch_size >= (LONG_RUN if work.recordable else LONG_UNRECORDED)
        return "compiled" if long and work.sizes.text.hidden >= LARGE else recorded
    return recorded if wanted == "graphs" else wanted


def _enough(work: Workload) -> int:
    """Return how many examples keep a GPU busy: more at a time are no faster, and padded further."""
    return -(-ENOUGH // (work.prefix + work.longest_target))
