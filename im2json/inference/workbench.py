"""What train.py and evaluate.py both need before they begin: device, data, processor, model, and limits that fit."""

from __future__ import annotations

import dataclasses
import functools
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
from im2json.data.loader import StepLoader, own_cores
from im2json.data.order import Order, even
from im2json.data.sources import open_splits
from im2json.errors import UserError
from im2json.inference.constrain import Grammar
from im2json.inference.evaluate import Evaluation, Sink
from im2json.jsontext import canonical
from im2json.model.base import DTYPES, load_base, load_processor, positions, resolve_precision
from im2json.model.card import check_card, precision_note
from im2json.model.features import Features, feature_bytes, is_frozen
from im2json.model.lora import add_lora
from im2json.model.memory import MARGIN, Forecast, Load, Setting, Sizes, forecast, free_bytes, largest_microbatch
from im2json.model.replay import Forward, make_forward
from im2json.options import TrainConfig
from im2json.runs import RunFolder
from im2json.scoring.checks import SumCheck, parse_checks
from im2json.scoring.schema import Schema, induce, read_schema

MICROBATCH_ON_CPU = 4  # examples
"""What `--microbatch auto` is there: more would not be faster."""
RECORDED = 1.5
"""What recorded passes reserve, to what they use: the graphs of different shapes share memory, but not every block."""
ENOUGH = 4096  # positions of a microbatch that keep a GPU busy, where it need not wait for launches
LONG_RUN = 8192  # examples after which compiling has paid for itself
LARGE = 1024  # hidden size of a language model whose layers are worth compiling


@dataclass(frozen=True)
class Manner:
    """How a training step is carried out; its result is the same."""

    launch: str  # single, graphs or compiled
    checkpointing: bool  # of gradients
    microbatch: int  # examples


@dataclass(frozen=True)
class Workbench:
    """A run's ingredients, each checked."""

    config: TrainConfig
    accelerator: Accelerator
    precision: str  # resolved: bf16, fp16 or fp32
    splits: dict[str, Split]  # train, validation, test
    collator: Collator
    lengths: TargetLengths
    model: PeftModel
    checks: list[SumCheck]
    schema: Schema  # of the answers
    grammar: Grammar | None  # what holds them to it, with --constrain

    def evaluation(self, run: RunFolder, sink: Sink) -> Evaluation:
        """What evaluates the model into this run folder."""
        return Evaluation(
            self.model,
            self.collator,
            self.splits,
            self.accelerator,
            run,
            sink,
            dtype=DTYPES[self.precision],
            max_new_tokens=self.max_new_tokens,
            batch_size=self.config.decode.eval_batch_size,
            count=self.config.train.eval_examples,
            checks=self.checks,
            grammar=self.grammar,
        )

    def pictures(self, split: str) -> Callable[[str], Image.Image]:
        """What gives the document of an example of a split by its id."""
        examples = self.splits[split]
        places = {id: place for place, id in enumerate(examples.ids)}
        return lambda id: examples[places[id]].image

    @property
    def max_new_tokens(self) -> int:
        """The longest answer that is generated."""
        room = positions(self.model) - len(self.collator.prefix_ids)
        return self.lengths.new_token_limit(self.config.decode.max_new_tokens, room)

    @property
    def asked(self) -> dict[str, Any]:
        """What reading with the adapter takes besides its weights; kept beside them."""
        data = self.config.data
        return {
            "prompt": data.prompt,
            "letterbox": data.letterbox,
            "quant": self.config.model.quant,
            "max_new_tokens": self.max_new_tokens,
        }

    def fingerprints(self) -> dict[str, str]:
        """By split, what tells its examples and their targets from others."""
        return {
            name: hashlib.sha256(canonical([list(split.ids), split.targets]).encode()).hexdigest()[:16]
            for name, split in self.splits.items()
        }

    @functools.cached_property
    def manner(self) -> Manner:
        """How training steps are carried out: what was asked for, and for what is `auto` what suits the device and its
        free memory, with one line to say so."""
        options, train = self.config.model, self.config.train
        share = -(-train.batch_size // self.accelerator.num_processes)
        if self.accelerator.device.type != "cuda":
            manner = Manner(
                "compiled" if options.launch == "compiled" else "single",
                options.gradient_checkpointing == "on",
                min(share, MICROBATCH_ON_CPU) if isinstance(train.microbatch, str) else train.microbatch,
            )
            if train.microbatch == "auto":
                self.accelerator.print(
                    f"--microbatch auto: {manner.microbatch} of a step's {share} examples a process, on a CPU"
                )
            return manner
        free, launch = free_bytes(), self._launch()

        def needs(microbatch: int, checkpointing: bool) -> float:
            # LoRA's weights are there already: a little more is asked for than the step takes
            parts = self.forecast(Manner(launch, checkpointing, microbatch))
            return parts.lora + parts.step * (1.0 if launch == "single" or checkpointing else RECORDED)

        checkpointing = options.gradient_checkpointing == "on"
        if options.gradient_checkpointing == "auto":
            least = 1 if isinstance(train.microbatch, str) else min(train.microbatch, share)
            checkpointing = needs(least, False) > MARGIN * free
        if isinstance(train.microbatch, int):
            found = train.microbatch
        else:
            found = largest_microbatch(
                even(share, most=share if launch == "single" or checkpointing else self._enough()),
                lambda size: needs(size, checkpointing),
                free,
            )
        manner = Manner("single" if checkpointing and launch == "graphs" else launch, checkpointing, found)
        self.accelerator.print(
            f"a step's {share} examples {min(found, share)} at a time, {'' if checkpointing else 'no '}gradient "
            f"checkpointing, launch {manner.launch}: {self.forecast(manner).step / 2**30:.1f} GiB beside the model are "
            f"forecast; {free / 2**30:.1f} are free"
        )
        return manner

    def _launch(self) -> str:
        """--launch on a GPU."""
        if self.config.model.launch != "auto":
            return self.config.model.launch
        examples = self._order().total(self.config.train) * self.config.train.batch_size
        large = self.model.config.get_text_config().hidden_size >= LARGE
        return "compiled" if large and examples >= LONG_RUN else "graphs"

    def _enough(self) -> int:
        """Examples that keep a GPU busy: more at a time are no faster, and padded further."""
        return -(-ENOUGH // (len(self.collator.prefix_ids) + self.lengths.longest))

    def forecast(self, manner: Manner) -> Forecast:
        """The peak of the memory, in parts, with the longest examples in one microbatch."""
        prefix = len(self.collator.prefix_ids)
        longest = sorted(self.lengths.by_split["train"])[-manner.microbatch :]
        answers = min(self.config.decode.eval_batch_size, len(self.splits["validation"]))
        load = Load(manner.microbatch, prefix + longest[-1], sum(longest), answers, prefix + self.max_new_tokens)
        compiled = manner.launch == "compiled"
        setting = Setting.of(self.config, self.precision, self.model, manner.checkpointing, compiled)
        return forecast(Sizes.of(self.model.config), setting, load)

    def forward(self) -> Forward:
        """The model's passes in training, which hold memory."""
        return make_forward(
            self.model, self.manner.launch, self.manner.checkpointing, self.forecast(self.manner).evaluation
        )

    def _order(self) -> Order:
        options, train = self.config.train, self.splits["train"]
        return Order(len(train), options.batch_size, options.seed, self.lengths.by_split["train"])

    def step_loader(self, whole: bool = True) -> StepLoader:
        """What feeds the training loop on this process. Unless for the `whole` run, nothing is worked out ahead."""
        gpu = self.accelerator.device.type == "cuda"
        features = self._features() if whole else None
        return StepLoader(
            self.splits["train"],
            self.collator,
            self._order(),
            microbatch=self.manner.microbatch,
            rank=self.accelerator.process_index,
            processes=self.accelerator.num_processes,
            workers=self._workers,
            pin_memory=gpu,
            known=None if features is None else features.batch,
        )

    @property
    def _workers(self) -> int:
        if self.config.data.workers is None:
            return 4 if self.accelerator.device.type == "cuda" else 0
        return self.config.data.workers

    def _features(self) -> Features | None:
        """Those of the training pictures, where they stay the same, are used again, and have room."""
        limit, split, order = self.config.model.cache_features, self.splits["train"], self._order()
        paligemma, dtype = self.model.get_base_model(), DTYPES[self.precision]
        epochs = order.total(self.config.train) / order.steps_per_epoch
        if limit == 0 or epochs < 2 or not is_frozen(paligemma):
            return None
        size = len(split) * feature_bytes(paligemma, dtype) / 2**30
        told = f"the vision tower is frozen: image features of {len(split):,} pictures ({size:.2f} GiB)"
        try:
            if size > limit:
                raise OSError(f"--cache-features is {limit:g}")
            features = Features(split, self.collator, paligemma, dtype, self._workers, self.accelerator)
        except OSError as error:
            self.accelerator.print(f"{told} are worked out in every step, as they cannot be kept: {error}")
            return None
        self.accelerator.print(f"{told} worked out once, in {features.seconds:.1f} s")
        return features


def start_accelerator(config: TrainConfig) -> tuple[Accelerator, str]:
    """Accelerate on the GPU, or else on the CPU with all its cores; and the precision that was settled on.

    Raises:
        UserError: if --precision is not possible here, or this build of torch does not serve the card.
    """
    cpu = not torch.cuda.is_available()
    if not cpu:
        check_card()
    precision = resolve_precision(config.model.precision, torch.device("cpu" if cpu else "cuda"))
    configured = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if configured not in ("no", precision):
        print(f"--precision {precision} wins over accelerate's mixed_precision {configured}")
    accelerator = Accelerator(
        mixed_precision="no" if precision == "fp32" else precision, cpu=cpu, log_with=further_trackers(config) or None
    )
    if note := precision_note(config.model.precision, precision):
        accelerator.print(note)
    # `accelerate launch` sets OMP_NUM_THREADS to 1 unless told otherwise, which would leave cores idle.
    torch.set_num_threads(config.train.threads or (own_cores() if cpu else min(own_cores(), 4)))
    set_seed(config.train.seed)
    return accelerator, precision


def further_trackers(config: TrainConfig) -> list[str]:
    """The names in --track.

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


def set_up(
    config: TrainConfig,
    accelerator: Accelerator,
    precision: str,
    *,
    adapter: Path | None = None,
    schema: Path | None = None,
) -> Workbench:
    """Load and check everything. `adapter` is a folder to read the adapter from in place of --adapter; `schema` is the
    file that a run has, or may have, in place of --schema.

    Raises:
        UserError: naming the option, file or row that is wrong.
    """
    checks = parse_checks(config.decode.check_sum)
    notes: list[str] = []
    checkup = check_split(*open_splits(config.data, notes).values(), skip_bad=config.data.skip_bad)
    for note in [*notes, *checkup.notes()]:
        accelerator.print(note)
    splits = checkup.splits
    collator = Collator(load_processor(config.model.model), config.data.prompt, config.data.letterbox)
    lengths = TargetLengths.count(splits, collator)
    accelerator.print(lengths.summary())
    given = Path(config.decode.schema) if config.decode.schema else None
    own = schema is not None and schema.is_file()
    file = schema if own else given
    if file is None:
        wanted = induce(splits["train"].targets)
    else:  # that of a run may be in the middle of being edited, and matters only where answers are held to it
        wanted = read_schema(file) if config.decode.constrain or not own else {}
    options = config.model
    base = load_base(options.model, precision, options.quant, accelerator.device, options.dequantize)
    lengths.check(config.data.max_target_tokens, len(collator.prefix_ids), positions(base))
    lora = dataclasses.replace(config.model, adapter=str(adapter)) if adapter else config.model
    model = add_lora(base, lora, config.train.seed)
    grammar = None
    if config.decode.constrain:
        name = f"schema {file}" if file else "the schema of the training targets"
        grammar = Grammar(wanted, collator.processor.tokenizer, base.lm_head.out_features, name)
    return Workbench(config, accelerator, precision, splits, collator, lengths, model, checks, wanted, grammar)
