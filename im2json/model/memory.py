"""How much memory a run will take on a GPU, from the sizes of the model alone; nothing is measured here.

Written out tensor by tensor, so that a change to the model or its layers shows which line is no longer true. Only what
grows with the model, the microbatch or the sequence is counted; CUDA's own 0.5 GiB or so, and what the allocator
loses between blocks, come on top. DoRA, which keeps more, is counted as LoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from im2json.model.base import DTYPES
from im2json.model.loss import CHUNK
from im2json.options import DECODERS, TrainConfig

# B examples, S positions of the text, I image tokens; widths: D hidden, F intermediate, A heads x head dimension.
# e is the bytes of a number in the precision of the computation.

NF4_BYTES = 4.127 / 8
"""A weight in NF4 with double quantisation."""
MARGIN = 0.9
"""Share of the free memory that is planned with: the rest is lost between blocks, or forecast wrongly."""
SLOTS, MOST_SLOTS = 64, 256
"""Answers generated at a time if that is left open: on a CPU and at least, and at most on a GPU."""
PREFIXES = 16
"""Pictures and prompts read at a time before their answers, on a GPU."""
DRAFTED = 32
"""Tokens of an answer read at a time, at most."""
CHOICES = 256
"""Tokens whose logits are held at a time in an evaluation."""


def head_size(text: Any) -> int:
    """Return the numbers of an attention head of a text config, which may leave them out."""
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


@dataclass(frozen=True)
class Tower:
    """A stack of transformer layers."""

    layers: int
    hidden: int  # D
    intermediate: int  # F
    heads: int
    kv_heads: int
    head_dim: int
    norms: int  # a layer
    linears: dict[str, tuple[int, int]]  # of a layer: name -> numbers in, numbers out
    head_norms: bool = False  # whether queries and keys are normalised
    causal: bool = False  # whether attention needs no mask

    @classmethod
    def of_decoder(cls, text: Any, norms: int = 2, *, head_norms: bool = False, causal: bool = False) -> Tower:
        """Return the decoder of a text config, with the seven linear layers that Gemma, Qwen and Llama have."""
        d, f = text.hidden_size, text.intermediate_size
        heads, kv_heads, size = text.num_attention_heads, text.num_key_value_heads, head_size(text)
        wide, narrow = heads * size, kv_heads * size
        linears = dict(
            q_proj=(d, wide), k_proj=(d, narrow), v_proj=(d, narrow), o_proj=(wide, d),
            gate_proj=(d, f), up_proj=(d, f), down_proj=(f, d),
        )  # fmt: skip
        return cls(text.num_hidden_layers, d, f, heads, kv_heads, size, norms, linears, head_norms, causal)

    @classmethod
    def of_siglip(cls, vision: Any) -> Tower:
        """Return the encoder of a config of SigLIP, or of one with its layers."""
        d, f, heads = vision.hidden_size, vision.intermediate_size, vision.num_attention_heads
        linears = dict(q_proj=(d, d), k_proj=(d, d), v_proj=(d, d), out_proj=(d, d), fc1=(d, f), fc2=(f, d))
        return cls(vision.num_hidden_layers, d, f, heads, heads, d // heads, norms=2, linears=linears)

    @property
    def linear_weights(self) -> int:
        return self.layers * sum(wide * high for wide, high in self.linears.values())

    def lora_weights(self, r: int, targets: Sequence[str]) -> int:
        return self.layers * r * sum(sum(self.linears[name]) for name in targets)


@dataclass(frozen=True)
class Sizes:
    """What of a model's config decides its memory."""

    text: Tower
    vision: Tower
    vocabulary: int
    image_tokens: int  # I
    projector: int  # weights between the towers
    other: int  # weights that are never quantised: of the patches and their positions


@dataclass(frozen=True)
class Setting:
    """What of a run's options decides its memory."""

    precision: str  # bf16, fp16 or fp32
    quant: str  # nf4 or none: of the weights as they lie in memory
    r: int
    dropout: bool
    moment_bytes: int  # of the optimizer, both moments of a weight together
    text_targets: tuple[str, ...]  # linear layers with LoRA, by the last part of their names
    vision_targets: tuple[str, ...]
    checkpointing: bool = False
    compiled: bool = False  # the layers

    @classmethod
    def of(cls, config: TrainConfig, precision: str, model: torch.nn.Module, tower: str) -> Setting:
        """Return the setting of a model that has its LoRA layers already, as far as options and model tell.

        Args:
            tower: found in the name of every module that sees pictures.
        """
        adapted = [name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A." in name]
        text, vision = (
            tuple(sorted({name.rsplit(".", 1)[-1] for name in adapted if any(part in name for part in parts)}))
            for parts in (DECODERS, [tower])
        )
        packed = any(parameter.dtype == torch.uint8 for parameter in model.parameters())
        return cls(
            precision, "nf4" if packed else "none", config.model.r, config.model.dropout > 0,
            8 if config.train.optimizer == "adamw" else 2, text, vision,
        )  # fmt: skip

    @property
    def bytes(self) -> int:
        return DTYPES[self.precision].itemsize


@dataclass(frozen=True)
class Load:
    """What is computed at a time."""

    microbatch: int  # B
    positions: int  # S: of the longest example, prefix included
    labels: int  # target tokens of a microbatch, at most
    eval_batch: int  # answers generated at a time
    eval_positions: int  # of each: the prefix and the longest answer


@dataclass(frozen=True)
class Forecast:
    """Bytes, part by part."""

    weights: float  # frozen, all but the embedding
    embedding: float  # tied to the output layer
    lora: float  # fp32 weights, gradients, the optimizer's moments, a layer's copy in 16 bits left out
    kept: float  # activations from the forward to the backward pass; with checkpointing each layer's input
    passing: float  # in the backward pass of a layer; with checkpointing its activations, computed again
    logits: float  # of one chunk of label positions, before the backward pass through the layers begins
    evaluation: float  # the merged copy and what generation takes, while nothing else is computed

    @property
    def resident(self) -> float:
        return self.weights + self.embedding + self.lora

    @property
    def step(self) -> float:
        """On top of what is resident."""
        return self.kept + max(self.passing, self.logits)

    @property
    def total(self) -> float:
        return self.resident + max(self.step, self.evaluation)


def forecast(sizes: Sizes, setting: Setting, load: Load) -> Forecast:
    """Return the peak of a run's memory, in parts."""
    text, vision, e = sizes.text, sizes.vision, setting.bytes
    linear = text.linear_weights + vision.linear_weights + sizes.projector
    trainable = text.lora_weights(setting.r, setting.text_targets)
    trainable += vision.lora_weights(setting.r, setting.vision_targets)
    kept, passing = _activations(sizes, setting, load)
    return Forecast(
        weights=linear * (NF4_BYTES if setting.quant == "nf4" else e) + sizes.other * e,
        embedding=sizes.vocabulary * text.hidden * e,
        lora=trainable * (4 + 4 + setting.moment_bytes),
        kept=kept,
        passing=passing,
        # each, its logarithm in fp32, and its gradient
        logits=min(load.labels, CHUNK) * sizes.vocabulary * (e + 4 + e),
        evaluation=_evaluation(sizes, setting, load, linear),
    )


def _activations(sizes: Sizes, setting: Setting, load: Load) -> tuple[float, float]:
    """Return what is kept for the backward pass, and what one layer takes in it, in bytes."""
    text, vision, e = sizes.text, sizes.vision, setting.bytes
    text_layer = decoder_layer_bytes(text, setting, load.microbatch, load.positions)
    vision_layer = encoder_layer_bytes(vision, setting, load.microbatch, sizes.image_tokens)
    if not setting.vision_targets:  # no gradient goes that far: nothing is kept
        vision_layer = 0
    numbers = load.microbatch * load.positions  # of every feature
    # the gradients of two of the MLP's inner tensors meet, with dropout LoRA's too; one weight is there in full
    gradients = (4 if setting.dropout else 2) * e * numbers * text.intermediate
    gradients += e * max(wide * high for wide, high in text.linears.values())
    last_norm = 4 * numbers * text.hidden
    if not setting.checkpointing:
        return text.layers * text_layer + vision.layers * vision_layer + last_norm, gradients
    inputs = text.layers * e * numbers * text.hidden + last_norm
    if setting.vision_targets:
        inputs += vision.layers * e * load.microbatch * sizes.image_tokens * vision.hidden
    return inputs, max(text_layer + gradients, vision_layer)


def decoder_layer_bytes(text: Tower, setting: Setting, examples: int, positions: int) -> float:
    """Return the bytes that autograd keeps of one of the decoder's layers.

    The frozen weights need no gradient, so that what goes into a linear layer is kept for its LoRA matrix alone.
    """
    e, targets, compiled = setting.bytes, setting.text_targets, setting.compiled
    numbers = examples * positions
    wide, narrow = text.heads * text.head_dim, text.kv_heads * text.head_dim  # A
    # The norm computes in fp32 and keeps its input's copy in it; compiled it keeps the input and converts it again.
    normed = text.norms * text.hidden + text.head_norms * (wide + narrow)
    norms = numbers * normed * (e if compiled else 4)
    # Queries and what comes out; keys and values; the softmax's sums in fp32. A mask becomes a bias of its own in each
    # layer, and the kernels that take one want keys and values repeated for every head. If a single one of theirs
    # serves all, that is a view.
    repeated = narrow if text.causal or text.kv_heads == 1 else wide
    masks = 0 if text.causal else e * examples * positions**2
    attention = 2 * e * numbers * (wide + repeated) + 4 * numbers * text.heads + masks
    # gelu(gate) * up: gate, up and gelu(gate), which is computed again where compiled
    mlp = (2 if compiled else 3) * e * numbers * text.intermediate
    # what comes out of attention is kept by it already
    groups = [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    return norms + attention + mlp + _lora_inputs(text, setting, targets, groups, numbers)


def encoder_layer_bytes(vision: Tower, setting: Setting, examples: int, positions: int) -> float:
    """Return the bytes that autograd keeps of one of SigLIP's layers."""
    e, numbers = setting.bytes, examples * positions
    norms = vision.norms * e * numbers * vision.hidden
    attention = 4 * e * numbers * vision.hidden + 4 * numbers * vision.heads
    mlp = e * numbers * vision.intermediate  # what gelu goes by
    groups = [["q_proj", "k_proj", "v_proj"], ["out_proj"], ["fc1"], ["fc2"]]
    return norms + attention + mlp + _lora_inputs(vision, setting, setting.vision_targets, groups, numbers)


def _lora_inputs(
    tower: Tower, setting: Setting, targets: Sequence[str], groups: Sequence[Sequence[str]], numbers: int
) -> float:
    """Return the bytes that a layer's LoRA matrices keep: the first its input, the second the first's output.

    Dropout makes a copy of the input for each, beside a mask of a byte a number. Without it, those in a group share
    one, and one in no group keeps what is kept anyway.
    """
    e = setting.bytes
    between = e * numbers * setting.r * len(targets)
    if setting.dropout:
        return between + (e + 1) * numbers * sum(tower.linears[name][0] for name in targets)
    shared = [next(name for name in group if name in targets) for group in groups if set(group) & set(targets)]
    return between + e * numbers * sum(tower.linears[name][0] for name in shared)


def _evaluation(sizes: Sizes, setting: Setting, load: Load, linear: int) -> float:
    """Return the bytes of a merged copy, its key/value cache, and the larger of merging and reading the prefix."""
    text, vision, e = sizes.text, sizes.vision, setting.bytes
    cache = 2 * text.layers * text.kv_heads * text.head_dim * e * load.eval_batch * load.eval_positions
    largest = max(wide * high for wide, high in text.linears.values())
    merging = 3 * 4 * largest  # LoRA's product in fp32, scaled, and in the weight's layout
    read = max(PREFIXES * sizes.image_tokens, DRAFTED * load.eval_batch)  # positions
    reading = 3 * e * read * max(text.intermediate, vision.intermediate)
    choosing = CHOICES * sizes.vocabulary * (e + 4 + 4)  # logits, and their logarithms in fp32, twice
    return linear * e + max(merging, cache + max(reading, choosing))


def slots_that_fit(slot_bytes: int) -> int:
    """Return how many answers to generate at a time on this GPU, SLOTS or up to MOST_SLOTS.

    More than SLOTS take no more than half of the memory that no process holds, so that training's recorded passes stay.

    Args:
        slot_bytes: keys and values of an answer and its prefix.
    """
    free, _ = torch.cuda.mem_get_info()
    return max(SLOTS, most_that_fit(MOST_SLOTS, lambda slots: slots * slot_bytes, free / 2))


def most_that_fit(most: int, needs: Callable[[int], float], available: float) -> int:
    """Return `most`, of examples or of answers, halved until the bytes that they need are available; at least 1."""
    while most > 1 and needs(most) > MARGIN * available:
        most = (most + 1) // 2
    return most


def free_bytes() -> float:
    """Return the bytes that this process may still take of its GPU.

    These are free for all processes, or held by this one's allocator and unused. They are no more than
    torch.cuda.set_per_process_memory_fraction leaves.
    """
    free, total = torch.cuda.mem_get_info()
    reserved, used = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
    allowed = torch.cuda.get_per_process_memory_fraction() * total
    return max(0.0, min(free + reserved, allowed) - used)
