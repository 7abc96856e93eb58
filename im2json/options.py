"""Every option of every script, declared once.

The command-line flags, a run folder's config.json, the axes of a sweep and the checks of all three follow from the
dataclasses below. A flag is the field's name with dashes. To add an option, add a field to the group that uses it. To
add a recipe, add an entry to PRESETS.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from im2json.catalogue import METRICS
from im2json.errors import UserError
from im2json.text import is_path, is_utf8, shortened

EMBEDDED_MODEL = "tiny"
"""The --model that is part of the package."""
SEVEN = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
"""The linear layers of a decoder's layer."""
DECODERS = ("language_model", "text_model")
"""Names that models give to their stack of decoder layers."""


@dataclass(frozen=True)
class Option:
    """Describe one option: what it means, which values it takes and when it may change.

    Attributes:
        name: the name of the field, and the key in config.json.
        group: the key in GROUPS.
        kind: the type of a value: bool, int, float or str.
        optional: whether the value may be None.
        default: the value if the user gives none. Where it is None, the help says what happens instead.
        help: a phrase that stands alone in --help. Further sentences may follow it.
        unit: what a number counts, in the plural. --help shows it with the default.
        metavar: what --help shows for the value, such as PATH or NAME, instead of its kind or choices.
        at_least: the smallest number allowed.
        above: the largest number that is too small.
        at_most: the largest number allowed.
        choices: the texts allowed. Empty if any text is.
        word: a text that is allowed instead of a number, such as `auto`.
        affects_result: False if the option changes how a run is carried out but not what it computes. It then takes no
            part in the identity of a sweep's point.
        added_later: True for an option that earlier versions did not have. At its default it takes no part in an
            identity, so sweeps and rows that were begun before it stay valid.
        changeable_on_resume: whether --resume accepts another value, which holds from there on. Always true of options
            that do not affect the result.
    """

    name: str
    group: str
    kind: type
    optional: bool
    default: Any
    help: str
    unit: str = ""
    metavar: str = ""
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    choices: tuple[str, ...] = ()
    word: str | None = None
    affects_result: bool = True
    added_later: bool = False
    changeable_on_resume: bool = False

    @property
    def is_path(self) -> bool:
        """Whether the value is a path, or may be one."""
        return "PATH" in self.metavar

    def problem(self, value: Any) -> str | None:
        """Return what is wrong with a value and what would be right, in one line, or None."""
        flag = flag_name(self.name)
        if value is None:
            return None if self.optional else f"{flag}: a value is needed"
        if self.word is not None and value == self.word:
            return None
        whole = isinstance(value, int) and not isinstance(value, bool)
        if whole and abs(value) > sys.float_info.max:
            return f"{flag}: a whole number of more than 300 digits is too large"
        fits = {
            bool: isinstance(value, bool),
            int: whole,
            float: (whole or isinstance(value, float)) and math.isfinite(value),
            str: isinstance(value, str),
        }[self.kind]
        if not fits:
            kind = f"{_KINDS[self.kind]}{f' or {self.word}' if self.word else ''}"
            return f"{flag}: {shortened(repr(value))} is not {kind}"
        if self.is_path and not (value and is_path(value)):
            return f"{flag}: {shortened(repr(value))} cannot be the name of a file"
        if self.kind is str and not self.is_path and not is_utf8(value):
            return f"{flag}: {shortened(repr(value))} is not UTF-8 text"
        if self.choices and value not in self.choices:
            return f"{flag}: {shortened(repr(value))} is not one of {', '.join(self.choices)}"
        if self.kind in (int, float):
            if self.at_least is not None and value < self.at_least:
                return f"{flag}: {value} is too small: at least {self.at_least}"
            if self.above is not None and value <= self.above:
                return f"{flag}: {value} is too small: more than {self.above}"
            if self.at_most is not None and value > self.at_most:
                return f"{flag}: {value} is too large: at most {self.at_most}"
        return None

    def coerce(self, value: Any) -> Any:
        """Return the value as the option holds it: a float where JSON or a preset wrote an int, a path without `~`."""
        if self.kind is float and value is not None:
            return float(value)
        return os.path.expanduser(value) if self.is_path and value is not None else value


_KINDS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}


def option(
    default: Any, help: str, *, affects_result: bool = True, changeable_on_resume: bool = False, **described: Any
) -> Any:
    """Declare an option as a field of its group.

    Args:
        described: further attributes of `Option`. The name, the group, the type and the texts that the type lists
            follow from the field.
    """
    changeable = changeable_on_resume or not affects_result
    described |= dict(help=help, affects_result=affects_result, changeable_on_resume=changeable)
    return dataclasses.field(default=default, metadata=described)


Trim = Literal["off", "crop", "squeeze"]
PrefixMask = Literal["full", "picture"]


@dataclass(frozen=True)
class DataOptions:
    dataset: str = option(
        "receipts",
        "Data set: `receipts` (embedded, synthetic), a folder, a JSON-lines file, or a data set on the hub.",
        metavar="NAME|PATH",
    )
    dataset_config: str | None = option(None, "Configuration of the data set, if it has several.", metavar="NAME")
    revision: str | None = option(None, "Branch, tag or commit of a data set on the hub.", metavar="NAME")
    train_split: str = option("train", "Split to train on.", metavar="NAME")
    image_column: str | None = option(
        None, "Column that holds the pictures or their paths. Default: detected.", metavar="NAME"
    )
    target_column: str | None = option(None, "Column that holds the targets. Default: detected.", metavar="NAME")
    skip_bad: int = option(
        0, "Leave out up to this many unusable rows. With more, the run stops.", unit="rows", at_least=0
    )
    letterbox: bool = option(False, "Pad pictures to a square with white instead of squashing them.")
    trim: Literal["off", "crop", "squeeze"] = option(
        "off",
        "Cut pictures to their printed area before they are resized. crop: cut them. squeeze: cut them, and leave out "
        "three of four rows without print. For scans of pages that are mostly blank.",
        added_later=True,
    )
    image_tokens: int | None = option(
        None,
        "Most image tokens of a picture, for models that read pictures at their own resolution. Larger pictures are "
        "scaled down to it. Default: 1,024, or for models that cut pictures into tiles what their own files say.",
        unit="tokens",
        at_least=64,
        added_later=True,
    )
    prefix_mask: Literal["full", "picture"] = option(
        "full",
        "Tokens that attend in both directions, for PaliGemma. full: picture and prompt, as PaliGemma was trained. "
        "picture: the picture alone, as vLLM computes it since November 2025.",
        added_later=True,
    )
    prompt: str = option("extract JSON.", "Prompt that the model gets with every picture. It is kept with the adapter.")
    max_target_tokens: int | None = option(
        None,
        "Refuse to train if a target is longer than this many tokens. Targets are never cut. Default: no limit.",
        unit="tokens",
        at_least=1,
    )
    workers: int | None = option(
        None,
        "Processes that decode pictures. Default: 4 on a GPU, otherwise 0.",
        unit="processes",
        at_least=0,
        affects_result=False,
    )


@dataclass(frozen=True)
class ModelOptions:
    model: str = option(
        EMBEDDED_MODEL,
        f"Base model: `{EMBEDDED_MODEL}` (embedded), a folder, or a model on the hub: PaliGemma, Qwen2.5-VL, Qwen3-VL, "
        "Gemma 3, SmolVLM2, Idefics 3 or PaddleOCR-VL. Without --preset any model but the embedded one takes the other "
        "values of --preset cord, except its data set and --target-modules.",
        metavar="NAME|PATH",
    )
    adapter: str | None = option(
        None,
        "Adapter or run folder to start from, with its LoRA options, base model, prompt and way of seeing pictures. "
        "The scores called `before` remain those of the base model alone. Default: a new adapter.",
        metavar="PATH",
    )
    r: int = option(16, "Rank of the LoRA matrices.", at_least=1)
    alpha: float | None = option(
        None, "LoRA's alpha. The output of LoRA is multiplied by alpha / r. Default: 2r.", above=0
    )
    dropout: float = option(0.0, "Dropout probability before the LoRA matrices.", at_least=0, at_most=0.999)
    target_modules: str = option(
        "language",
        "Linear layers that get LoRA: `language` for the seven kinds of the language model, `both` for every layer of "
        "both towers, names joined by commas (in both towers where they match), or a regular expression over full "
        "module names.",
        metavar="NAMES",
    )
    rslora: bool = option(False, "Multiply the output of LoRA by alpha / sqrt(r) instead (rank-stabilised LoRA).")
    dora: bool = option(False, "Learn the magnitude and the direction of the weights separately (DoRA).")
    quant: Literal["nf4", "none"] = option(
        "nf4", "Quantisation of the frozen weights: nf4 (4-bit NF4 with double quantisation) or none."
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = option(
        "auto",
        "Floating-point type of the computation. auto: bf16 on GPUs that support it, fp16 on older ones, fp32 on a "
        "CPU.",
    )
    launch: Literal["auto", "single", "graphs", "compiled"] = option(
        "auto",
        "How a GPU receives its work. single: kernel by kernel. graphs: whole passes, recorded as CUDA graphs. "
        "compiled: graphs of compiled layers, which are faster still after a minute of compiling. auto: graphs, or "
        "compiled in long runs. Nothing is recorded while gradient checkpointing is on.",
        affects_result=False,
    )
    dequantize: Literal["auto", "on", "off"] = option(
        "auto",
        "Keep the dequantized values of the 4-bit weights in memory instead of computing them in every pass. The "
        "values are the same and take 4 times the memory (8 times in fp32). auto: on where there is plenty of memory.",
        affects_result=False,
    )
    gradient_checkpointing: Literal["auto", "on", "off"] = option(
        "auto",
        "Recompute activations in the backward pass, which saves memory and costs time. auto: on if even the smallest "
        "possible microbatch would not fit into the GPU's memory otherwise.",
        affects_result=False,
    )
    cache_features: float = option(
        8.0,
        "Size limit, in GiB, of the scratch file on each machine that keeps the features of every training picture, so "
        "that they are computed only once. It is used if the vision tower is frozen and each picture is seen at least "
        "twice. 0: compute features in every step.",
        unit="GiB",
        at_least=0,
        affects_result=False,
    )


@dataclass(frozen=True)
class DecodeOptions:
    max_new_tokens: int | None = option(
        None,
        "Longest answer to generate, in tokens, within what the model can hold. Default: an eighth more than the "
        "longest target.",
        unit="tokens",
        at_least=1,
    )
    constrain: bool = option(
        False,
        "Generate only JSON that the run's schema.json allows. Needs the extra [constrain].",
        changeable_on_resume=True,
    )
    schema: str | None = option(
        None, "JSON Schema to use instead of the one induced from the training targets.", metavar="PATH"
    )
    eval_batch_size: int | Literal["auto"] = option(
        "auto",
        "Answers generated at a time, per process. auto: 64, or up to 256 where a GPU's memory has plenty of room.",
        unit="examples",
        at_least=1,
        affects_result=False,
    )
    check_sum: str | None = option(
        None,
        "Amounts that should add up, such as `menu.price + menu.sub.price = total.total_price`, several joined by "
        "semicolons. The result says of each answer whether they do. No answer is changed.",
        affects_result=False,
    )


@dataclass(frozen=True)
class TrainOptions:
    lr: float = option(5e-3, "Peak learning rate.", above=0)
    schedule: Literal["cosine", "linear", "constant"] = option(
        "cosine", "Course of the learning rate after the warmup."
    )
    warmup: float = option(0.03, "Share of the steps in which the learning rate rises from 0.", at_least=0, at_most=1)
    weight_decay: float = option(0.0, "Decoupled weight decay of AdamW.", at_least=0)
    max_grad_norm: float = option(1.0, "Largest norm of the gradients. Larger ones are scaled down to it.", above=0)
    epochs: float = option(
        2.0,
        "Passes over the training split. Ignored if --steps is given.",
        unit="epochs",
        above=0,
        changeable_on_resume=True,
    )
    steps: int | None = option(
        None,
        "Optimizer updates. Overrides --epochs.",
        unit="steps",
        at_least=1,
        changeable_on_resume=True,
    )
    batch_size: int = option(4, "Examples per step, over all processes and microbatches.", unit="examples", at_least=1)
    microbatch: int | Literal["auto"] = option(
        4,
        "Examples per forward and backward pass, per process. auto: as many as fit into the GPU's memory.",
        unit="examples",
        at_least=1,
        affects_result=False,
    )
    optimizer: Literal["paged_adamw_8bit", "adamw_8bit", "adamw"] = option(
        "paged_adamw_8bit",
        "AdamW with its state in 8 bits and paged (paged_adamw_8bit), in 8 bits (adamw_8bit), or plain (adamw).",
    )
    eval_every: int = option(
        50,
        "Steps between evaluations of generated text on the validation split. 0: never.",
        unit="steps",
        at_least=0,
        changeable_on_resume=True,
    )
    eval_examples: int | None = option(
        None, "Validation examples per evaluation. Default: all.", unit="examples", at_least=1
    )
    metric: str = option(
        "field_f1",
        "Metric that selects the best adapter and that --patience watches.",
        choices=tuple(METRICS),
        metavar="NAME",
    )
    patience: int | None = option(
        None,
        "Stop after this many evaluations without an improvement. Default: never.",
        unit="evaluations",
        at_least=1,
        changeable_on_resume=True,
    )
    save_every: int | None = option(
        None,
        "Steps between checkpoints. 0: never. Default: at every evaluation.",
        unit="steps",
        at_least=0,
        affects_result=False,
    )
    keep: int = option(
        2, "How many of the latest checkpoints to keep.", unit="checkpoints", at_least=1, affects_result=False
    )
    seed: int = option(0, "Seed for LoRA initialisation, example order and dropout.", at_least=0, at_most=2**32 - 1)
    test: bool = option(True, "Score the test split before and after training.", changeable_on_resume=True)
    output: str | None = option(
        None, "Run folder. Default: a new one under runs/.", metavar="PATH", affects_result=False
    )
    track: str | None = option(
        None,
        "Trackers that also get the scalars, joined by commas: wandb and others that accelerate supports.",
        metavar="NAMES",
        affects_result=False,
    )
    threads: int | None = option(
        None,
        "CPU threads per process. Default: the cores divided by the processes, at most 4 on a GPU.",
        unit="threads",
        at_least=1,
        affects_result=False,
    )


GROUPS: dict[str, type] = {
    "data": DataOptions,
    "model": ModelOptions,
    "decode": DecodeOptions,
    "train": TrainOptions,
}


def _declared(group: str, options: type) -> Iterator[Option]:
    """Yield the options that the fields of a group declare.

    A field's type says what a value may be: a number, a number or a word, any text, or one of a Literal's texts. It may
    add None.
    """
    hints = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        hint = hints[field.name]
        members = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
        texts = tuple(text for each in members if typing.get_origin(each) is Literal for text in typing.get_args(each))
        kind = next((each for each in members if each in (bool, int, float, str)), str)
        described: dict[str, Any] = dict(field.metadata)
        if texts:
            described |= dict(choices=texts) if kind is str else dict(word=texts[0])
        yield Option(field.name, group, kind, types.NoneType in members, field.default, **described)


OPTIONS: dict[str, Option] = {
    option.name: option for group, options in GROUPS.items() for option in _declared(group, options)
}
"""Every option by name, in the order of the flags."""

# The best settings for PaliGemma-3B on receipts in the ablations of the study that this project follows.
_PALIGEMMA_RECIPE: dict[str, Any] = dict(
    r=32,
    alpha=64.0,
    dropout=0.05,
    lr=2e-4,
    epochs=3.0,
    batch_size=16,
    microbatch="auto",
    max_grad_norm=0.3,
    warmup=0.03,
    eval_every=25,
)
# Half the rank, and gradients clipped at 1: an instruct model needs less to take on a form of answer.
_CHAT_RECIPE = {
    "dataset": "naver-clova-ix/cord-v2", **_PALIGEMMA_RECIPE, "r": 16, "alpha": 32.0, "max_grad_norm": 1.0,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "cord": dict(
        model="google/paligemma-3b-pt-224",
        dataset="naver-clova-ix/cord-v2",
        target_modules=SEVEN,
        **_PALIGEMMA_RECIPE,
    ),
    "qwen": dict(model="Qwen/Qwen3-VL-2B-Instruct", **_CHAT_RECIPE),
    "qwen2.5": dict(model="Qwen/Qwen2.5-VL-3B-Instruct", **_CHAT_RECIPE),
    "gemma3": dict(model="google/gemma-3-4b-it", **_CHAT_RECIPE),
    "smolvlm": dict(model="HuggingFaceTB/SmolVLM2-2.2B-Instruct", **_CHAT_RECIPE),
    "paddleocr": dict(model="PaddlePaddle/PaddleOCR-VL", **_CHAT_RECIPE),
    "docling": dict(model="ibm-granite/granite-docling-258M", **_CHAT_RECIPE),
}


def language_modules(decoder: str) -> str:
    """Return the regular expression that `--target-modules language` stands for, with a decoder of this name."""
    return rf".*{decoder.rpartition('.')[2]}.*\.({SEVEN.replace(',', '|')})"


@dataclass(frozen=True)
class TrainConfig:
    """All options of a run, by group. Every value has passed its checks, and alpha is resolved."""

    data: DataOptions
    model: ModelOptions
    decode: DecodeOptions
    train: TrainOptions

    @classmethod
    def resolve(cls, given: Mapping[str, Any], preset: str | None = None) -> TrainConfig:
        """Return the config for what a user typed: the given values, over those of a preset, over the defaults.

        Without a preset, a model other than the embedded one takes PaliGemma's recipe.

        Raises:
            UserError: if there is no such preset. Otherwise it names every unknown option and every wrong value.
        """
        if preset is not None and preset not in PRESETS:
            raise UserError(f"unknown preset {preset!r}: choose from {', '.join(PRESETS)}")
        if preset is not None:
            recipe = PRESETS[preset]
        else:
            recipe = {} if given.get("model", EMBEDDED_MODEL) == EMBEDDED_MODEL else _PALIGEMMA_RECIPE
        values = {**recipe, **given}
        if "r" in given and "alpha" not in given:
            values.pop("alpha", None)  # a recipe's alpha belongs to the recipe's r
        return cls.from_values(values)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Return the config with these values, over the defaults. No preset or recipe adds to them.

        Raises:
            UserError: which names every unknown option and every wrong value.
        """
        problems = [problem for name, value in values.items() if (problem := check(name, value))]
        if problems:
            raise UserError("\n".join(problems))
        values = {name: OPTIONS[name].coerce(value) for name, value in values.items()}
        if values.get("alpha") is None:
            values["alpha"] = 2.0 * values.get("r", OPTIONS["r"].default)
        groups = {
            group: options(**{f.name: values[f.name] for f in dataclasses.fields(options) if f.name in values})
            for group, options in GROUPS.items()
        }
        return cls(**groups)

    def flat(self) -> dict[str, Any]:
        """Return every value by the name of its option, as config.json, the flags and a sweep's axes have them."""
        return {name: value for group in GROUPS for name, value in dataclasses.asdict(getattr(self, group)).items()}

    def identity(self, names: Iterable[str]) -> dict[str, Any]:
        """Return the values of these options as an identity holds them: without `added_later` ones at their default."""
        values = self.flat()
        return {n: values[n] for n in names if not (OPTIONS[n].added_later and values[n] == OPTIONS[n].default)}

    def replace(self, **changes: Any) -> TrainConfig:
        """Return a copy with some values changed.

        Raises:
            UserError: which names every unknown option and every wrong value.
        """
        return TrainConfig.from_values({**self.flat(), **changes})


def check(name: str, value: Any) -> str | None:
    """Return what is wrong with this value for this option, in one line, or None."""
    if name not in OPTIONS:
        return f"unknown option {name!r}: {suggestion(name, OPTIONS)}"
    return OPTIONS[name].problem(value)


def flag_name(name: str) -> str:
    """Return the command-line flag of an option."""
    return "--" + name.replace("_", "-")


_SYNONYMS = {
    "rank": "r", "lora_r": "r", "lora_alpha": "alpha", "lora_dropout": "dropout", "learning_rate": "lr",
    "lr_scheduler_type": "schedule", "warmup_ratio": "warmup", "num_train_epochs": "epochs", "max_steps": "steps",
    "batch": "batch_size", "per_device_train_batch_size": "microbatch", "optim": "optimizer", "output_dir": "output",
    "eval_steps": "eval_every", "save_steps": "save_every",
}  # fmt: skip
"""Options by the names that they have in PEFT and in the Trainer of transformers."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that a mistyped one is for, or None if it is not near to any.

    Near is one letter more, less, other or swapped with its neighbour, and in names of 8 letters or more, two.
    """
    from rapidfuzz.distance import OSA

    names = list(known)
    if not names:
        return None
    if _SYNONYMS.get(name) in names:
        return _SYNONYMS[name]
    letters = min(len(name) - 1, 1 if len(name) < 8 else 2)
    distance, found = min(((OSA.distance(name, each), each) for each in names), key=lambda pair: pair[0])
    return found if distance <= letters else None


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return a question that names the known name that is near to a mistyped one, or else where they are listed."""
    found = nearest(name, known)
    return "im2json train --help lists the options" if found is None else f"did you mean {found!r}?"
