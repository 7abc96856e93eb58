"""The forecast of memory against what autograd keeps, and against what PaliGemma-3B took on a GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from peft import PeftModel
from PIL import Image
from small_model import save_small_chat
from transformers import PaliGemmaConfig, Qwen3VLConfig

from im2json.data.collate import Batch
from im2json.data.example import Example
from im2json.families import open_collator
from im2json.families.base import Family
from im2json.families.paligemma import PaliGemma
from im2json.families.qwen import Qwen
from im2json.model.base import load_base
from im2json.model.lora import add_lora, count_parameters
from im2json.model.memory import MARGIN, Load, Setting, Sizes, forecast, most_that_fit
from im2json.model.replay import make_forward
from im2json.options import SEVEN, TrainConfig

GIB = 2**30
TEXT, VISION = tuple(SEVEN.split(",")), ("q_proj", "k_proj", "v_proj")


def paligemma(resolution: int) -> Sizes:
    """PaliGemma-3B."""
    return PaliGemma().sizes(
        PaliGemmaConfig(
            vision_config=dict(
                model_type="siglip_vision_model", hidden_size=1152, intermediate_size=4304, num_hidden_layers=27,
                num_attention_heads=16, patch_size=14, image_size=resolution,
            ),
            text_config=dict(
                model_type="gemma", hidden_size=2048, intermediate_size=16384, num_hidden_layers=18,
                num_attention_heads=8, num_key_value_heads=1, head_dim=256, vocab_size=257216,
            ),
        )
    )  # fmt: skip


def setting(**changes: object) -> Setting:
    usual = Setting("bf16", "nf4", 8, True, 2, TEXT, VISION)
    return dataclasses.replace(usual, **changes)  # type: ignore[arg-type]


def load(resolution: int, microbatch: int) -> Load:
    """CORD-shaped rows: 6 tokens of prompt, targets of 180 on average and at most 400."""
    return Load(microbatch, (resolution // 14) ** 2 + 406, 180 * microbatch, 8, (resolution // 14) ** 2 + 456)


def adapted(model: str, **options: object) -> tuple[PeftModel, TrainConfig]:
    given = {"model": model, "r": 4, "alpha": 8.0, "dropout": 0.0, "quant": "none", "optimizer": "adamw", **options}
    config = TrainConfig.resolve(given)
    return add_lora(load_base(model, "fp32", "none", torch.device("cpu")), config.model, seed=0), config


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": "language"},
        {"target_modules": "q_proj,down_proj"},
        {"checkpointing": True},
    ],
    ids=["all", "language", "two", "checkpointing"],
)
def test_what_is_kept_is_what_autograd_saves(small_model, batch: Batch, options):
    """On a CPU in fp32 without dropout, whose mask takes more there than on a GPU."""
    checkpointing = options.pop("checkpointing", False)
    model, config = adapted(small_model, **options)
    family, inputs = PaliGemma(), long(batch)
    make_forward(model, family.hidden_states, "single", checkpointing)
    measured = saved_bytes(family, model, inputs)
    examples, positions = inputs["input_ids"].shape
    setting = dataclasses.replace(Setting.of(config, "fp32", model, "vision_tower"), checkpointing=checkpointing)
    kept = forecast(family.sizes(model.config), setting, Load(examples, positions, 1, 1, 1)).kept
    assert kept == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("target_modules", ["language", "q_proj,down_proj"])
def test_what_is_kept_of_a_chat_model_is_what_autograd_saves(tmp_path, target_modules):
    folder, family = str(save_small_chat(tmp_path / "chat")), Qwen()
    model, config = adapted(folder, target_modules=target_modules)
    examples = [Example(str(i), Image.new("RGB", (40, 60 + i)), {"total": "1" * 300}) for i in range(2)]
    inputs = open_collator(folder, "extract JSON.")(examples).inputs
    kept = forecast(
        family.sizes(model.config), Setting.of(config, "fp32", model, family.tower),
        Load(*inputs["input_ids"].shape, 1, 1, 1),
    ).kept  # fmt: skip
    assert kept == pytest.approx(saved_bytes(family, model, inputs), rel=0.03)


def saved_bytes(family: Family, model: PeftModel, inputs: dict[str, torch.Tensor]) -> int:
    """Return what autograd saves of a forward pass besides weights."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    saved: dict[int, torch.Tensor] = {}  # by storage, kept alive so that no address comes twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _hidden = family.hidden_states(model.get_base_model(), inputs)
    return sum(tensor.untyped_storage().nbytes() for place, tensor in saved.items() if place not in own)


def long(batch: Batch) -> dict[str, torch.Tensor]:
    """The inputs of a batch with a target as long as a receipt's."""
    more = {name: torch.cat([value, value[:, -1:].expand(-1, 300)], 1) for name, value in batch.inputs.items()
            if value.ndim == 2}  # fmt: skip
    return {**batch.inputs, **more}


def test_lora_weights_are_counted_as_they_are(small_model):
    for modules in ("q_proj,down_proj", "language", SEVEN):
        model, config = adapted(small_model, target_modules=modules)
        one = Setting.of(config, "fp32", model, "vision_tower")
        trainable, total = count_parameters(model)
        parts = forecast(PaliGemma().sizes(model.config), one, Load(1, 10, 1, 1, 1))
        assert parts.lora == trainable * (4 + 4 + 8)
        assert parts.weights + parts.embedding == pytest.approx((total - trainable) * 4, rel=0.02)  # biases, norms


@pytest.mark.parametrize(
    ("resolution", "microbatch", "changes", "gib"),
    [
        (224, 16, {}, 45),
        (224, 16, {"compiled": True}, 38),
        (224, 16, {"compiled": True, "dropout": False, "vision_targets": ()}, 26),
        (448, 16, {"compiled": True, "dropout": False, "vision_targets": ()}, 55),
        (224, 16, {"checkpointing": True}, 6.2),
        (448, 16, {"checkpointing": True}, 11.6),
        (448, 4, {"checkpointing": True}, 4.6),
    ],
)
def test_what_paligemma_took_on_a_gpu(resolution, microbatch, changes, gib):
    """Peaks of steps on one H100, of LoRA with r 8."""
    parts = forecast(paligemma(resolution), setting(**changes), load(resolution, microbatch))
    assert (parts.resident + parts.step) / GIB == pytest.approx(gib, rel=0.15)


@pytest.mark.parametrize(("changes", "gib"), [({}, 82.7), ({"compiled": True}, 66.6)], ids=str)
def test_what_a_chat_model_took_on_a_gpu(changes, gib):
    """Peaks of steps on one H200, weights left out: Qwen3-VL-4B, receipts of 1,080 tokens, targets of 400, r 16."""
    text = dict(
        hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, vocab_size=151936,
    )  # fmt: skip
    language = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    sizes = Qwen().sizes(Qwen3VLConfig(text_config=text), 1080)
    one = Setting("bf16", "none", 16, True, 2, language, (), **changes)
    assert forecast(sizes, one, Load(8, 1510, 8 * 180, 64, 1510)).step / GIB == pytest.approx(gib, rel=0.03)


def test_the_most_that_fit_that_has_room():
    sizes, one = paligemma(224), setting()
    needs = {size: forecast(sizes, one, load(224, size)).step for size in (16, 8, 4, 2, 1)}
    assert list(needs.values()) == sorted(needs.values(), reverse=True)
    for size, need in needs.items():
        assert most_that_fit(16, needs.__getitem__, need * 1.001 / MARGIN) == size
        assert most_that_fit(16, needs.__getitem__, need * 0.999 / MARGIN) == max(size // 2, 1)
    assert most_that_fit(10, float, 6.0) == 5
    assert most_that_fit(5, float, 2.0) == 1
