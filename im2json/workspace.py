"""What a command has loaded of one run: accelerator, data, model and schema, each checked."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import set_seed
from peft import PeftModel
from PIL import Image

from im2json.data.check import check_split
from im2json.data.collate import Collator
from im2json.data.example import Split
from im2json.data.lengths import TargetLengths
from im2json.data.loader import StepLoader
from im2json.data.order import Order, Share
from im2json.data.sources import open_splits
from im2json.errors import UserError
from im2json.inference.evaluate import Evaluation, Sink
from im2json.inference.settings import DecodeSettings
from im2json.jsontext import canonical
from im2json.machine import own_cores
from im2json.model.base import DTYPES, load_processor, positions, resolve_precision
from im2json.model.features import Features, feature_bytes, is_frozen
from im2json.model.gpu import precision_note
from im2json.model.loading import choose_device, load_adapted
from im2json.model.memory import Setting, Sizes, free_bytes
from im2json.model.replay import Forward, make_forward
from im2json.options import TrainConfig
from im2json.runs import RunFolder
from im2json.scoring.checks import parse_checks
from im2json.scoring.schema import Schema, induce, read_schema
from im2json.training.strategy import Strategy, Workload


@dataclass(frozen=True)
class Workspace:
    """Everything a command has loaded for one run."""

    config: TrainConfig
    accelerator: Accelerator
    precision: str  # resolved: bf16, fp16 or fp32
    splits: dict[str, Split]  # train, validation, test
    collator: Collator
    lengths: TargetLengths
    model: PeftModel
    settings: DecodeSettings
    schema: Schema | None  # of the answers; None if the run has one that was not needed

    @property
    def usage(self) -> dict[str, Any]:
        """The settings that inference needs besides the weights. They are saved next to the adapter."""
        return {
            "prompt": self.config.data.prompt,
            "letterbox": self.config.data.letterbox,
            "quant": self.config.model.quant,
            "max_new_tokens": self.settings.max_new_tokens,
        }

    @property
    def order(self) -> Order:
        """The order in which the training examples are seen."""
        options = self.config.train
        return Order(len(self.splits["train"]), options.batch_size, options.seed, self.lengths.by_split["train"])

    @property
    def workers(self) -> int:
        """Processes that decode pictures for the training loop."""
        if self.config.data.workers is None:
            return 4 if self.accelerator.device.type == "cuda" else 0
        return self.config.data.workers

    def fingerprints(self) -> dict[str, str]:
        """Return a digest of the ids and targets of each split."""
        return {
            name: hashlib.sha256(canonical([list(split.ids), split.targets]).encode()).hexdigest()[:16]
            for name, split in self.splits.items()
        }

    def pictures(self, split: str) -> Callable[[str], Image.Image]:
        """Return a function that gives the document of an example of a split by its id."""
        examples = self.splits[split]
        indices = {id: i for i, id in enumerate(examples.ids)}
        return lambda id: examples[indices[id]].image

    def evaluation(self, run: RunFolder, sink: Sink) -> Evaluation:
        """Return the evaluation of the model, which writes its predictions to this run folder."""
        return Evaluation(self.model, self.collator, self.splits, self.accelerator, self.settings, run, sink)

    def workload(self) -> Workload:
        """Return the inputs of `choose_strategy`, including the GPU memory that is free now."""
        assert isinstance(self.settings.max_new_tokens, int)
        return Workload(
            config=self.config,
            sizes=Sizes.of(self.model.config),
            setting=Setting.of(self.config, self.precision, self.model),
            target_lengths=self.lengths.by_split["train"],
            longest_target=self.lengths.longest,
            prefix=len(self.collator.prefix_ids),
            eval_batch=min(self.settings.batch_size, len(self.splits["validation"])),
            max_new_tokens=self.settings.max_new_tokens,
            processes=self.accelerator.num_processes,
            steps=self.order.total(self.config.train),
            free_bytes=free_bytes() if self.accelerator.device.type == "cuda" else None,
        )

    def forward(self, strategy: Strategy, work: Workload) -> Forward:
        """Return the model's pass in training, which leaves the memory that an evaluation needs."""
        reserve = work.forecast(strategy).evaluation
        return make_forward(self.model, strategy.launch, strategy.checkpointing, reserve)

    def step_loader(self, strategy: Strategy, features: Features | None = None) -> StepLoader:
        """Return the loader of the training batches of this process."""
        return StepLoader(
            self.splits["train"],
            self.collator,
            self.order,
            Share(strategy.microbatch, self.accelerator.process_index, self.accelerator.num_processes),
            workers=self.workers,
            pin_memory=self.accelerator.device.type == "cuda",
            known=None if features is None else features.batch,
        )

    def compute_features(self) -> tuple[Features | None, str | None]:
        """Compute the image features of the training pictures once, so that no step has to.

        This is done only if the vision tower is frozen, the run takes at least 2 epochs, and --cache-features allows
        for the size.

        Returns:
            The features, or None; and a line to print on what was done, or None if the vision tower is trained.
        """
        limit, split, order = self.config.model.cache_features, self.splits["train"], self.order
        paligemma, dtype = self.model.get_base_model(), DTYPES[self.precision]
        epochs = order.total(self.config.train) / order.steps_per_epoch
        if limit == 0 or epochs < 2 or not is_frozen(paligemma):
            return None, None
        size = len(split) * feature_bytes(paligemma, dtype) / 2**30
        head = f"the vision tower is frozen: image features of {len(split):,} pictures ({size:.2f} GiB)"
        each_step = f"{head} are worked out in every step, as they cannot be kept"
        if size > limit:
            return None, f"{each_step}: --cache-features is {limit:g}"
        try:
            features = Features(split, self.collator, paligemma, dtype, self.workers, self.accelerator)
        except OSError as error:
            return None, f"{each_step}: {error}"
        return features, f"{head} worked out once, in {features.seconds:.1f} s"


def start_accelerator(config: TrainConfig) -> tuple[Accelerator, str]:
    """Start Accelerate on the GPU, or on the CPU with all its cores, and print a note on the precision if there is one.

    Returns:
        The accelerator, and the precision: bf16, fp16 or fp32.

    Raises:
        UserError: if --precision is not possible here, or this build of torch does not serve the GPU.
    """
    device = choose_device()
    precision = resolve_precision(config.model.precision, device)
    configured = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if configured not in ("no", precision):
        print(f"--precision {precision} wins over accelerate's mixed_precision {configured}")
    accelerator = Accelerator(
        mixed_precision="no" if precision == "fp32" else precision,
        cpu=device.type == "cpu",
        log_with=further_trackers(config) or None,
    )
    if note := precision_note(config.model.precision, precision):
        accelerator.print(note)
    # `accelerate launch` sets OMP_NUM_THREADS to 1 unless told otherwise, which would leave cores idle.
    torch.set_num_threads(config.train.threads or (own_cores() if device.type == "cpu" else min(own_cores(), 4)))
    set_seed(config.train.seed)
    return accelerator, precision


def further_trackers(config: TrainConfig) -> list[str]:
    """Return the names in --track.

    Raises:
        UserError: if one is unknown to accelerate, or its package is not installed.
    """
    names = [name.strip() for name in (config.train.track or "").split(",") if name.strip()]
    usable = sorted(kind.value for kind in get_available_trackers() if kind.value != "tensorboard")
    for name in names:
        if name not in usable:
            found = ", ".join(usable) or "none"
            raise UserError(
                f"--track {name}: accelerate knows no such tracker or its package is not installed (usable here: "
                f"{found}); TensorBoard is always written"
            )
    return names


def open_workspace(
    config: TrainConfig,
    accelerator: Accelerator,
    precision: str,
    *,
    adapter: Path | None = None,
    schema: Path | None = None,
) -> Workspace:
    """Load and check everything, and print what a reader of the results should know of the data.

    Args:
        accelerator, precision: see `start_accelerator`.
        adapter: the folder to read the adapter from in place of --adapter.
        schema: the file that a run has, or may have, in place of --schema.

    Raises:
        UserError: naming the option, file or row that is wrong.
    """
    checks = parse_checks(config.decode.check_sum)
    accelerator.print(f"reading the data set {config.data.dataset}")
    notes: list[str] = []
    checkup = check_split(*open_splits(config.data, notes).values(), skip_bad=config.data.skip_bad)
    for note in [*notes, *checkup.notes()]:
        accelerator.print(note)
    collator = Collator(load_processor(config.model.model), config.data.prompt, config.data.letterbox)
    lengths = TargetLengths.count(checkup.splits, collator)
    accelerator.print(lengths.summary())
    wanted, name = _find_schema(config, checkup.splits["train"], schema)
    options = config.model if adapter is None else dataclasses.replace(config.model, adapter=str(adapter))
    weights = precision if options.quant == "none" else options.quant
    accelerator.print(f"loading the model {options.model} (weights in {weights}, computation in {precision})")
    model = load_adapted(options, precision, accelerator.device, config.train.seed)
    lengths.check(config.data.max_target_tokens, len(collator.prefix_ids), positions(model))
    limit = lengths.new_token_limit(config.decode.max_new_tokens)
    held_to = (wanted, name) if config.decode.constrain and wanted is not None else None
    settings = DecodeSettings.of(config, precision, model, collator, limit, held_to, checks)
    return Workspace(config, accelerator, precision, checkup.splits, collator, lengths, model, settings, wanted)


def _find_schema(config: TrainConfig, train: Split, stored: Path | None) -> tuple[Schema | None, str]:
    """Return the schema of the answers, and what it is called in an error: a run's own, --schema, or that of the
    training targets."""
    if stored is not None and stored.is_file():
        # it may be in the middle of being edited, and matters only where answers are held to it
        return read_schema(stored) if config.decode.constrain else None, f"schema {stored}"
    if config.decode.schema:
        return read_schema(Path(config.decode.schema)), f"schema {config.decode.schema}"
    return induce(train.targets), "the schema of the training targets"
