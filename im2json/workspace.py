"""What a command has loaded of one run: accelerator, data, model and schema, each checked."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from peft import PeftModel
from PIL import Image

from im2json.data.check import check_split, examine
from im2json.data.collate import Collator
from im2json.data.example import RunSplit, Split
from im2json.data.lengths import TargetLengths, TargetMeter
from im2json.data.loader import StepLoader
from im2json.data.order import Order, Share
from im2json.data.sources import open_splits
from im2json.data.splits import RunSplits, divide, restore
from im2json.errors import UserError
from im2json.families import Family, check_adapter, collator_of, family_of
from im2json.inference.evaluate import Evaluation, Sink
from im2json.inference.settings import DecodeSettings
from im2json.jsontext import canonical
from im2json.machine import own_cores
from im2json.model.base import DTYPES, load_positions, resolve_precision
from im2json.model.features import Features, is_frozen
from im2json.model.gpu import precision_note
from im2json.model.loading import choose_device, load_adapted
from im2json.model.memory import SLOTS, Setting, free_bytes
from im2json.model.replay import Forward, make_forward
from im2json.options import DataOptions, TrainConfig
from im2json.records import Content
from im2json.resume import WARM_START_OPTIONS, check_end, check_unchanged, trained_contents
from im2json.runs import RunFolder
from im2json.scoring.checks import parse_checks
from im2json.scoring.schema import Schema, induce, read_schema
from im2json.training.strategy import Strategy, Workload


def reading_line(options: DataOptions) -> str:
    """Return the line that says which data set is read now, without the working directory if it lies below that."""
    path = options.dataset
    below = os.path.isabs(path) and Path(path).is_relative_to(os.getcwd())
    return f"reading the data set {os.path.relpath(path) if below else path}"


@dataclass(frozen=True)
class Workspace:
    """Everything a command has loaded for one run."""

    config: TrainConfig
    accelerator: Accelerator
    precision: str  # resolved: bf16, fp16 or fp32
    data: RunSplits
    collator: Collator
    family: Family
    model: PeftModel
    settings: DecodeSettings
    schema: Schema | None  # of the answers; None if the run has one that was not needed

    @property
    def splits(self) -> dict[str, RunSplit]:
        """The splits train, validation and test."""
        return self.data.splits

    @property
    def usage(self) -> dict[str, Any]:
        """The settings that inference needs besides the weights. They are saved next to the adapter."""
        return {
            "model_type": self.model.config.model_type,
            **{name: getattr(self.config.data, name) for name in WARM_START_OPTIONS},
            "quant": self.config.model.quant,
            "max_new_tokens": self.settings.max_new_tokens,
            "text": self.collator.text,
            "seen": self.collator.described,
        }

    @property
    def order(self) -> Order:
        """The order in which the training examples are seen."""
        return order_of(self.config, self.data)

    @property
    def lengths(self) -> TargetLengths:
        """How long the targets are."""
        return self.data.lengths

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
        slots = SLOTS if self.settings.batch_size == "auto" else self.settings.batch_size
        return Workload(
            config=self.config,
            sizes=self.family.sizes(self.model.config, self.config.data.image_tokens),
            setting=Setting.of(self.config, self.precision, self.model, self.family.tower),
            target_lengths=self.lengths.by_split["train"],
            longest_target=self.lengths.longest,
            prefix=self.collator.longest_prefix,
            eval_batch=min(slots, len(self.splits["validation"])),
            max_new_tokens=self.settings.max_new_tokens,
            processes=self.accelerator.num_processes,
            steps=self.order.total(self.config.train),
            recordable=self.family.records_steps,
            free_bytes=free_bytes() if self.accelerator.device.type == "cuda" else None,
        )

    def forward(self, strategy: Strategy, work: Workload) -> Forward:
        """Return the model's pass in training, which leaves the memory that an evaluation needs."""
        reserve = work.forecast(strategy).evaluation
        hidden_states, recordable = self.family.hidden_states, self.family.records_steps
        launch, checkpointing = strategy.launch, strategy.checkpointing
        return make_forward(self.model, hidden_states, launch, checkpointing, recordable=recordable, reserve=reserve)

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
        base, dtype = self.model.get_base_model(), DTYPES[self.precision]
        epochs, found = order.total(self.config.train) / order.steps_per_epoch, self.family.features(base)
        if limit == 0 or epochs < 2 or found is None or not is_frozen(base):
            return None, None
        size = len(split) * math.prod(found.shape) * dtype.itemsize / 2**30
        head = f"the vision tower is frozen: image features of {len(split):,} pictures ({size:.2f} GiB)"
        each_step = f"{head} are worked out in every step, as they cannot be kept"
        if size > limit:
            return None, f"{each_step}: --cache-features is {limit:g}"
        try:
            features = Features(split, self.collator, *found, dtype, self.workers, self.accelerator)
        except OSError as error:
            return None, f"{each_step}: {error}"
        return features, f"{head} worked out once, in {features.seconds:.1f} s"


def order_of(config: TrainConfig, data: RunSplits) -> Order:
    """Return the order in which a run sees its training examples."""
    rows = data.splits["train"].rows
    lengths, image_tokens = [row.tokens for row in rows], [row.image_tokens for row in rows]
    return Order(len(rows), config.train.batch_size, config.train.seed, lengths, image_tokens)


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
    resumed: RunFolder | None = None,
    evaluated: RunFolder | None = None,
    scored: str | None = None,
) -> Workspace:
    """Load and check everything, and print what a reader of the results should know of the data.

    Args:
        accelerator, precision: see `start_accelerator`.
        adapter: the folder to read the adapter from in place of --adapter.
        schema: the file that a run has, or may have, in place of --schema.
        resumed: the run that goes on, with the very examples that it began with.
        evaluated: the run whose splits are read, as far as their examples are still there.
        scored: the split of `evaluated` that must have an example left, which is found out before the model is loaded.

    Raises:
        UserError: naming the option, file or row that is wrong.
    """
    checks = parse_checks(config.decode.check_sum)
    if resumed is None and adapter is None:  # a run that goes on may have lost the adapter that it began with
        check_adapter(config.model)
    collator = collator_of(config.model.model, config.data)
    found = _open_data(config, accelerator, collator, resumed, evaluated)
    if evaluated is not None and scored is not None and not len(found.splits[scored]):
        raise UserError(
            f"{evaluated.path}: no example of its {scored} split is what it was when the run began; put "
            f"{config.data.dataset} back as it was"
        )
    wanted, name = _find_schema(config, found.splits["train"], schema)
    options = config.model if adapter is None else dataclasses.replace(config.model, adapter=str(adapter))
    weights = precision if options.quant == "none" else options.quant
    accelerator.print(f"loading the model {options.model} (weights in {weights}, computation in {precision})")
    model = load_adapted(options, precision, accelerator.device, config.train.seed)
    limit = found.lengths.new_token_limit(config.decode.max_new_tokens)
    held_to = (wanted, name) if config.decode.constrain and wanted is not None else None
    settings = DecodeSettings.of(config, precision, model, collator, limit, held_to, checks)
    family = family_of(model.config)
    return Workspace(config, accelerator, precision, found, collator, family, model, settings, wanted)


def _open_data(
    config: TrainConfig,
    accelerator: Accelerator,
    collator: Collator,
    resumed: RunFolder | None,
    evaluated: RunFolder | None,
) -> RunSplits:
    """Return the splits of a run, and print what a reader of the results should know of them.

    Raises:
        UserError: if rows are bad or too few, or are not those that a resumed run began with.
    """
    accelerator.print(reading_line(config.data))
    meter = TargetMeter(collator, load_positions(config.model.model), config.data.max_target_tokens)
    notes: list[str] = []
    found = _find_splits(config, meter, resumed or evaluated, notes)
    if resumed is not None:
        check_unchanged(resumed, config.data.dataset, found.lost, found.begun_with)
        check_end(resumed, config.train, order_of(config, found).total(config.train))
    if evaluated is None and config.train.test and not len(found.splits["test"]):
        raise UserError(
            f"--dataset {config.data.dataset}: every row of the test split has the picture and target of one that is "
            "trained on; test on others, or pass --no-test"
        )
    for note in [*notes, *found.notes()]:
        accelerator.print(note)
    accelerator.print(found.lengths.summary())
    return found


def _find_splits(config: TrainConfig, meter: TargetMeter, begun: RunFolder | None, notes: list[str]) -> RunSplits:
    """Return the splits of a run that begins, or those of a run that has begun."""
    options, splits = config.data, open_splits(config.data, notes).values()
    learned: set[Content] = set()
    if begun is None and config.model.adapter is not None:
        learned = trained_contents(Path(config.model.adapter), notes)
    elif begun is not None:
        record = begun.read_splits()
        if record is not None:
            return restore(record, examine(splits, meter))
        notes.append(
            f"{begun.path} was begun by an older version, which kept no splits.json: its splits are cut from what "
            f"{options.dataset} holds now, so rows that it was trained on may be among those it is tested on"
        )
    checkup = check_split(*splits, measure=meter, skip_bad=options.skip_bad)
    return divide(checkup, options.dataset, notes, learned)


def _find_schema(config: TrainConfig, train: Split, stored: Path | None) -> tuple[Schema | None, str]:
    """Return the schema of the answers, and what it is called in an error: a run's own, --schema, or that of the
    training targets."""
    if stored is not None and stored.is_file():
        # it may be in the middle of being edited, and matters only where answers are held to it
        return read_schema(stored) if config.decode.constrain else None, f"schema {stored}"
    if config.decode.schema:
        return read_schema(Path(config.decode.schema)), f"schema {config.decode.schema}"
    return induce(train.targets), "the schema of the training targets"
