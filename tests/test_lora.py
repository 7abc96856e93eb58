"""LoRA on the frozen base: what is trained, what is packed, and that merging and evaluating leave the model alone."""

from __future__ import annotations

import copy
import json
import re
import shutil
import socket
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from bitsandbytes.functional import dequantize_4bit
from helpers import clear_error, reset_accelerate, slow, summed_loss_of
from peft import PeftModel
from safetensors.torch import load_file
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration, PaliGemmaProcessor
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from im2json.data.collate import Batch
from im2json.data.sources import load_splits
from im2json.inference.evaluate import Evaluation
from im2json.inference.settings import DecodeSettings
from im2json.model.base import DTYPES, load_base, resolve_precision
from im2json.model.lora import (
    add_lora,
    count_parameters,
    merged_copy,
    read_adapter_weights,
    trained,
    write_adapter_weights,
)
from im2json.model.norms import fuse_norms
from im2json.options import SEVEN, ModelOptions, language_modules
from im2json.resume import fresh_options
from im2json.runs import RunFolder

CPU = torch.device("cpu")
VISION = "base_model.model.model.vision_tower.encoder.layers"
TEXT = "base_model.model.model.language_model.layers"
IN_LAYERS = {  # of the small model, by what the names end with
    VISION: ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"],
    TEXT: ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
           "mlp.up_proj", "mlp.down_proj"],
}  # fmt: skip
VARIANTS = [{}, {"rslora": True}, {"dora": True}]


def options(**values) -> ModelOptions:
    return ModelOptions(**({"model": "small", "r": 4, "alpha": 12.0} | values))


def lora_model(folder: str, quant: str = "nf4", precision: str = "fp32", **values) -> PeftModel:
    """LoRA with B (and DoRA's magnitudes) away from where they start."""
    model = add_lora(load_base(folder, precision, quant, CPU), options(**{"target_modules": SEVEN, **values}), seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in trained(model):
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


# --- what is trained


@pytest.fixture(scope="module")
def paligemma_3b_224() -> PaliGemmaConfig:
    return PaliGemmaConfig(
        vision_config=dict(
            model_type="siglip_vision_model", hidden_size=1152, intermediate_size=4304, num_hidden_layers=27,
            num_attention_heads=16, patch_size=14, image_size=224, projection_dim=2048, vision_use_head=False,
        ),
        text_config=dict(
            model_type="gemma", hidden_size=2048, intermediate_size=16384, num_hidden_layers=18,
            num_attention_heads=8, num_key_value_heads=1, head_dim=256, vocab_size=257216, tie_word_embeddings=True,
        ),
        image_token_index=257152, projection_dim=2048, hidden_size=2048,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("r", "published"),
    [
        (8, 11_298_816),
        *slow((4, 5_649_408), (16, 22_597_632), (32, 45_195_264), (64, 90_390_528), (128, 180_781_056)),
    ],
)
def test_trainable_counts_of_paligemma_3b(paligemma_3b_224, r, published):
    with torch.device("meta"):
        base = PaliGemmaForConditionalGeneration(paligemma_3b_224)
        options = ModelOptions(model="paligemma", r=r, alpha=2.0 * r, target_modules=SEVEN)
        model = add_lora(base.requires_grad_(False), options, seed=0)
    assert count_parameters(model) == (published, 2_923_466_480 + published)


def test_exactly_which_weights_are_packed_and_trained(small_model):
    model = lora_model(small_model)
    packed = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.uint8}
    targeted = {name for names in IN_LAYERS.values() for name in names if name.split(".")[-1] in SEVEN.split(",")}
    expected = {
        f"{layers}.{i}.{name}.{'base_layer.' if name in targeted else ''}weight"
        for layers, names in IN_LAYERS.items() for name in names for i in (0, 1)
    }  # fmt: skip
    assert packed == expected | {"base_model.model.model.multi_modal_projector.linear.weight"}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == {
        f"{layers}.{i}.{name}.lora_{matrix}.default.weight"
        for layers, names in IN_LAYERS.items() for name in names if name in targeted
        for i in (0, 1) for matrix in "AB"
    }  # fmt: skip
    assert all(parameter.dtype == torch.float32 for parameter in trained(model))


def test_nf4_is_doubly_quantised_and_computes_in_the_precision(small_model):
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        base = load_base(small_model, precision, "nf4", CPU)
        layer = base.model.language_model.layers[0].mlp.up_proj
        assert layer.weight.quant_state.quant_type == "nf4"
        assert layer.weight.quant_state.nested
        assert layer.compute_dtype == dtype
        assert base.model.language_model.embed_tokens.weight.dtype == dtype
        assert not any(parameter.requires_grad for parameter in base.parameters())
        assert all(p.dtype == torch.float32 for p in trained(add_lora(base, options(), 0)))


def test_counts_take_two_weights_a_packed_byte(small_model):
    plain, packed = lora_model(small_model, "none"), lora_model(small_model)
    assert count_parameters(packed) == count_parameters(plain)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_first_values_are_those_of_the_seed(small_model, seed):
    first, again = (add_lora(load_base(small_model, "fp32", "none", CPU), options(), seed) for _ in range(2))
    other = add_lora(load_base(small_model, "fp32", "none", CPU), options(), seed + 1)
    assert all(torch.equal(a, b) for a, b in zip(trained(first), trained(again)))
    assert not all(torch.equal(a, b) for a, b in zip(trained(first), trained(other)))


# --- target modules


def targeted(folder: str, wanted: str) -> set[str]:
    model = add_lora(load_base(folder, "fp32", "none", CPU), options(target_modules=wanted), seed=0)
    return {
        name.removeprefix("base_model.model.model.").removesuffix(".lora_A.default.weight")
        for name, _ in model.named_parameters() if "lora_A" in name
    }  # fmt: skip


def layers(folder: str, pattern: str) -> set[str]:
    base = load_base(folder, "fp32", "none", CPU)
    linear = {name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    return {short for name in linear if re.search(pattern, short := name.removeprefix("model."))}


@pytest.mark.parametrize(
    ("wanted", "pattern"),
    [
        (SEVEN, r"(q|k|v|o|gate|up|down)_proj$"),
        ("q_proj, v_proj", r"(q|v)_proj$"),
        ("self_attn.q_proj", r"q_proj$"),
        ("fc1,down_proj", r"(fc1|down_proj)$"),
        ("language", r"^language_model.*(q|k|v|o|gate|up|down)_proj$"),
        (r".*vision_tower.*\.(fc1|fc2|out_proj)", r"^vision_tower.*(fc1|fc2|out_proj)$"),
        (r"model\.language_model\.layers\.1\..*_proj", r"^language_model\.layers\.1\."),
        (r".*\.layers\.0\.mlp\.(up_proj|fc1)", r"layers\.0\.mlp\.(up_proj|fc1)$"),
    ],
)
def test_target_modules(small_model, wanted, pattern):
    expected = layers(small_model, pattern)
    assert expected
    assert targeted(small_model, wanted) - {"lm_head"} == expected


def test_the_seven_names_match_both_towers_and_language_one(small_model):
    both, one = targeted(small_model, SEVEN), targeted(small_model, ModelOptions().target_modules)
    assert len(both) == 2 * 3 + 2 * 7
    assert len(one) == 2 * 7
    assert one < both


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("q_proj,query", r"is named query: there are .*q_proj"),
        ("proj", "is named proj"),
        ("(q_proj", "is not a regular expression"),
        (r".*vision.*\.o_proj", "matches no linear layer: they are named like"),
        (r".*layernorm.*", "matches no linear layer"),
    ],
)
def test_target_modules_that_match_nothing_are_refused(small_model, wanted, said):
    with pytest.raises(ValueError, match=said) as error:
        targeted(small_model, wanted)
    assert "--target-modules" in str(error.value) and "\n" not in str(error.value)


# --- merging


def merged_by_hand(model: PeftModel, name: str, variant: dict) -> torch.Tensor:
    """W + scaling B A, or DoRA's magnitude over the columns' norms, of one layer; 32 bits."""
    layer = model.get_submodule(f"base_model.model.{name}")
    weight = layer.base_layer.weight
    if weight.dtype == torch.uint8:
        weight = dequantize_4bit(weight.data, weight.quant_state)
    scaling = 12.0 / (4**0.5 if variant.get("rslora") else 4)
    changed = weight.float() + scaling * layer.lora_B["default"].weight @ layer.lora_A["default"].weight  # out x in
    if variant.get("dora"):
        magnitude = layer.lora_magnitude_vector["default"].weight  # out
        changed = changed * (magnitude / changed.norm(dim=1))[:, None]
    return changed


@pytest.mark.parametrize("variant", VARIANTS, ids=["lora", "rslora", "dora"])
@pytest.mark.parametrize("quant", ["nf4", "none"])
def test_a_merged_copy_is_the_weights_worked_out_by_hand(small_model, quant, variant):
    model = lora_model(small_model, quant, **variant)
    merged = merged_copy(model, torch.float32)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    adapted = layers(small_model, r"(q|k|v|o|gate|up|down)_proj$")
    for name in adapted:
        wanted = merged_by_hand(model, f"model.{name}", variant).detach()
        got = merged.get_submodule(f"model.{name}").weight
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    base = model.get_base_model()
    plain = merged_copy(model, torch.float32, adapter=False)
    for name, parameter in plain.named_parameters():
        owner, _, leaf = name.rpartition(".")
        module = base.get_submodule(owner)
        wanted = getattr(getattr(module, "base_layer", module), leaf)
        if wanted.dtype == torch.uint8:
            wanted = dequantize_4bit(wanted.data, wanted.quant_state)
        assert torch.equal(parameter, wanted), name
        if not any(layer in name for layer in adapted):
            assert torch.equal(merged.get_parameter(name), wanted), name


@pytest.mark.parametrize("variant", VARIANTS, ids=["lora", "rslora", "dora"])
@pytest.mark.parametrize("quant", ["nf4", "none"])
def test_a_merged_copy_answers_as_the_model_does(small_model, batch, quant, variant):
    model = lora_model(small_model, quant, **variant)
    with torch.no_grad():
        loss = summed_loss_of(model, batch)
        for adapter in (True, False):
            answers = summed_loss_of(merged_copy(model, torch.float32, adapter=adapter), batch)
            assert bool(torch.isclose(answers, loss, rtol=1e-5)) is adapter


@pytest.mark.parametrize("kind", [GemmaRMSNorm, Gemma2RMSNorm, Gemma3RMSNorm, LlamaRMSNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_norms_are_those_of_transformers(kind, dtype):
    torch.manual_seed(0)
    norm = kind(64).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x = (torch.randn(3, 5, 64) * 20).to(dtype)
    wanted, weights = norm(x), set(norm.state_dict())
    fuse_norms(norm)
    found = norm(x)
    assert found.dtype == dtype and set(norm.state_dict()) == weights
    torch.testing.assert_close(found, wanted, rtol=1e-6 if dtype == torch.float32 else 2**-7, atol=1e-5)  # of bf16, two


def test_a_merged_copy_is_what_bf16_says(small_model, monkeypatch):
    model = lora_model(small_model, precision="bf16")
    asked, original = set(), torch.set_default_dtype
    monkeypatch.setattr(torch, "set_default_dtype", lambda dtype: (asked.add(dtype), original(dtype)))
    merged = merged_copy(model, torch.bfloat16)
    assert asked <= {torch.float32}  # it is that of all threads
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    config = merged.config
    assert {part.dtype for part in (config, config.text_config, config.vision_config)} == {torch.bfloat16}
    assert not merged.training
    assert merged.config.use_cache and merged.generation_config.use_cache


def snapshot(model: PeftModel) -> dict[str, torch.Tensor]:
    state = {name: value.clone() for name, value in model.named_parameters()}
    return state | {f"buffer {name}": value.clone() for name, value in model.named_buffers()}


@pytest.mark.parametrize("quant", ["nf4", "none"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_merging_leaves_the_model_as_it_was(small_model, quant, precision):
    model = lora_model(small_model, quant, precision, dropout=0.1)
    before, config = snapshot(model), copy.deepcopy(model.peft_config["default"].to_dict())
    modes = {name: module.training for name, module in model.named_modules()}
    merged = merged_copy(model, DTYPES[precision])
    changed = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in before if ".lora_" in name}
    with torch.no_grad():
        for name in changed:  # whatever somebody does to what LoRA changed in the copy
            merged.get_submodule(name).weight.zero_()
    after = snapshot(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.peft_config["default"].to_dict() == config
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name in before if "lora_" in name
    }


# --- evaluating changes nothing


class NoSink:
    def scalars(self, *_, **__) -> None:
        pass

    def picture(self, *_) -> None:
        pass


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    reset_accelerate()
    return Accelerator(cpu=True)


def gradients(model: PeftModel, batch: Batch, precision: str) -> list[torch.Tensor]:
    torch.manual_seed(0)  # of dropout
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss = summed_loss_of(model, batch)
    return list(torch.autograd.grad(loss, trained(model)))


@pytest.mark.parametrize(("quant", "precision"), [("nf4", "bf16"), ("nf4", "fp32"), ("none", "fp32")])
def test_gradients_before_and_after_an_evaluation_are_equal(
    small_model, dataset, collator, batch, accelerator, tmp_path, quant, precision
):
    """Also where bitsandbytes would repack 4-bit layers for inference, and lose gradients through them, in their first
    forward without gradients."""
    model = lora_model(small_model, quant, precision, dropout=0.2)
    before = gradients(model, batch, precision)
    assert all(gradient.abs().max() > 0 for gradient in before)
    state, training = torch.random.get_rng_state(), model.training
    evaluation = Evaluation(
        model, collator, load_splits(dataset), accelerator,
        DecodeSettings(max_new_tokens=4, batch_size=2, dtype=DTYPES[precision]), RunFolder(tmp_path), NoSink(),
    )  # fmt: skip
    evaluation("validation", 1, "during")
    evaluation("test", 1, "before", adapter=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training is training
    after = gradients(model, batch, precision)
    assert all(torch.equal(one, other) for one, other in zip(before, after))


# --- adapters on disk


def test_an_adapter_survives_its_file(small_model, tmp_path):
    model = lora_model(small_model, dora=True)
    write_adapter_weights(model, tmp_path / "weights.safetensors")
    other = add_lora(load_base(small_model, "fp32", "nf4", CPU), options(dora=True, target_modules=SEVEN), seed=5)
    assert not torch.equal(trained(other)[0], trained(model)[0])
    read_adapter_weights(other, tmp_path / "weights.safetensors")
    assert all(torch.equal(one, another) for one, another in zip(trained(model), trained(other)))
    third = add_lora(load_base(small_model, "fp32", "nf4", CPU), options(r=8, target_modules=SEVEN), seed=5)
    with pytest.raises(ValueError, match="does not fit this adapter") as error:
        read_adapter_weights(third, tmp_path / "weights.safetensors")
    assert "\n" not in str(error.value)


def test_an_adapter_is_merged_written_and_read_without_asking_the_hub(small_model, tmp_path, monkeypatch):
    """PEFT would look there for the config of a base that is named and lies in no folder, such as `tiny`."""
    asked: list[object] = []

    def refuse(host: object, *_: object, **__: object) -> None:
        asked.append(host)
        raise socket.gaierror("there is no network")

    model = lora_model(small_model, model="tiny")
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    write_adapter_weights(model, tmp_path / "weights.safetensors")
    read_adapter_weights(model, tmp_path / "weights.safetensors")
    merged_copy(model, torch.float32)
    assert asked == []


def test_a_warm_start_goes_on_with_the_adapter_and_its_own_options(finished, train, tmp_path):
    run = train(tmp_path / "warm", "--adapter", finished.path, "--steps", 1, "--no-test", "--lr", "1e-12")
    taken, given = run.read_config(), finished.read_config()
    assert (taken.model.r, taken.model.alpha, taken.data.prompt) == (4, 8.0, given.data.prompt)
    assert sorted(taken.model.target_modules.split(",")) == sorted(given.model.target_modules.split(","))
    one, other = (load_file(r.adapter / "adapter_model.safetensors") for r in (finished, run))
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-6)
    assert max(float(value.abs().max()) for name, value in other.items() if "lora_B" in name) > 1e-3
    assert json.loads((run.adapter / "adapter_config.json").read_text())["r"] == 4


def test_a_warm_start_takes_base_and_prompt_of_its_adapter(finished, tmp_path):
    folder = Path(shutil.copytree(finished.adapter, tmp_path / "adapter"))
    (folder / "im2json.json").write_text('{"prompt": "read this", "letterbox": true, "r": 99}')
    taken = fresh_options({"adapter": str(folder), "lr": 0.1})
    assert (taken["prompt"], taken["model"], taken["lr"]) == ("read this", finished.read_config().model.model, 0.1)
    assert (taken["letterbox"], taken["r"]) == (True, 4)
    assert fresh_options({"adapter": str(folder), "prompt": "mine", "model": "a/b"}).items() >= {
        ("prompt", "mine"), ("model", "a/b"), ("r", 4),
    }  # fmt: skip
    assert "model" not in fresh_options({"adapter": str(folder)}, "cord")  # the preset's it is
    assert fresh_options({"adapter": str(folder), "target_modules": "language"})["target_modules"] == "language"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["target_modules"] == language_modules("language_model")
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": SEVEN.split(",")[::-1]}))
    assert fresh_options({"adapter": str(folder), "target_modules": SEVEN.replace(",", ", ")})["r"] == 4


@pytest.mark.parametrize(
    ("given", "said"),
    [({"r": 16}, "--r 16: --adapter .* was made with 4"), ({"alpha": 1.0}, "--alpha 1.0"), ({"dora": True}, "--dora"),
     ({"target_modules": "q_proj"}, "--target-modules")],
)  # fmt: skip
def test_a_warm_start_refuses_what_its_adapter_contradicts(finished, given, said):
    with pytest.raises(ValueError, match=said):
        fresh_options({"adapter": str(finished.path), **given})


def test_a_warm_start_from_another_kind_of_adapter_is_refused(finished, tmp_path):
    folder = Path(shutil.copytree(finished.adapter, tmp_path / "adapter"))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "IA3"}))
    with pytest.raises(ValueError, match="peft_type is IA3, not LORA"):
        fresh_options({"adapter": str(folder)})


@pytest.mark.parametrize("left", [2, *slow(0)])
def test_a_warm_start_is_resumed_without_the_adapter_it_began_with(finished, train, resume, tmp_path, left):
    """Neither from its first checkpoint, which holds what it began with, nor from a later one."""
    begun_with = Path(shutil.copytree(finished.adapter, tmp_path / "adapter"))
    flags = ("--adapter", begun_with, "--steps", 4, "--no-test", "--keep", 3)
    whole = train(tmp_path / "whole", *flags)
    run = train(tmp_path / "run", *flags)
    run.result.unlink()
    for step in range(left + 1, 5):
        shutil.rmtree(run.checkpoints / f"step-{step}", ignore_errors=True)
    shutil.rmtree(begun_with)
    weights = [load_file(r.adapter / "adapter_model.safetensors") for r in (whole, resume(run))]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_warm_start_from_what_does_not_fit_is_refused(finished, cli, base_args, tmp_path):
    for name, said in (("nowhere", "there is no such folder"), ("other", "does not fit this model")):
        folder = tmp_path / name
        if name == "other":
            shutil.copytree(finished.adapter, folder)
            config = json.loads((folder / "adapter_config.json").read_text())
            (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 5}))
        flags = (*base_args, "--r", 5, "--adapter", folder, "--output", tmp_path / "run")
        error = clear_error(cli("train", *flags))
        assert said in error and str(folder) in error
        assert not (tmp_path / "run").exists()


def test_an_adapter_loads_with_plain_peft(finished, small_model, batch):
    base = PaliGemmaForConditionalGeneration.from_pretrained(small_model)
    model = PeftModel.from_pretrained(base, str(finished.adapter))
    ours = add_lora(load_base(small_model, "fp32", "none", CPU), options(alpha=8.0), seed=0)
    read_adapter_weights(ours, finished.adapter / "adapter_model.safetensors")
    with torch.no_grad():
        losses = [summed_loss_of(m.eval(), batch) for m in (model, ours)]
        assert torch.equal(losses[0], losses[1])
        with model.disable_adapter():
            assert not torch.isclose(summed_loss_of(model, batch), losses[0], rtol=1e-4)
    processor = PaliGemmaProcessor.from_pretrained(finished.adapter)
    assert processor.image_seq_length == 4
    assert Path(json.loads((finished.adapter / "adapter_config.json").read_text())["base_model_name_or_path"]) == Path(
        small_model
    )


# --- precision


def test_precision_on_a_cpu():
    assert resolve_precision("auto", CPU) == "fp32"
    assert resolve_precision("bf16", CPU) == "bf16"
    with pytest.raises(ValueError, match="--precision fp32"):
        resolve_precision("fp16", CPU)
