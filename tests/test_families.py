"""Every family of models, by the questions that `Family` asks: the same tests for all of them."""

from __future__ import annotations

import json
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import clear_error, launch, metrics, slow, summed_loss_of
from PIL import Image
from safetensors import safe_open
from small_model import (
    CHAT_TEMPLATE,
    save_small_chat,
    save_small_gemma3,
    save_small_idefics3,
    save_small_paddleocr,
    save_small_paligemma,
    save_small_qwen25,
    save_small_smolvlm,
)
from transformers import AutoModelForImageTextToText, GenerationConfig

from im2json.app import main
from im2json.data.collate import IGNORE, Batch, Collator, Pictures, join_pictures
from im2json.data.example import Example
from im2json.errors import UserError
from im2json.families import FAMILIES, family_of, open_collator
from im2json.inference.decode import Decoder, Request
from im2json.jsontext import canonical
from im2json.model.base import load_base, load_config
from im2json.model.lora import add_lora, merged_copy, trained
from im2json.options import DECODERS, TrainConfig
from im2json.runs import RunFolder

SAVED = {
    "paligemma": save_small_paligemma,
    "qwen3_vl": save_small_chat,
    "qwen2_5_vl": save_small_qwen25,
    "gemma3": save_small_gemma3,
    "smolvlm": save_small_smolvlm,
    "idefics3": save_small_idefics3,
    "paddleocr_vl": save_small_paddleocr,
}
PROMPT = "extract JSON."
NEW = 24


def noise(seed: int, size: tuple[int, int]) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


SIZES = [(30, 20), (40, 60), (17, 90), (64, 64)]
EXAMPLES = [
    Example(f"e{i}", noise(i, size), {"nm": "x" * 7 * i, "stop": "<eos> <|im_end|> é"}) for i, size in enumerate(SIZES)
]
IMAGES = [example.image for example in EXAMPLES]


# Idefics 3 computes what SmolVLM2 does
@pytest.fixture(scope="session", params=[*(name for name in SAVED if name != "idefics3"), *slow("idefics3")])
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def folder(kind, tmp_path_factory) -> Path:
    """The folder of a small model of this family."""
    return SAVED[kind](tmp_path_factory.mktemp("family") / kind)


@pytest.fixture(scope="session")
def collator(folder) -> Collator:
    return open_collator(str(folder), PROMPT)


@pytest.fixture(scope="session")
def model(folder) -> Any:
    return talkative(folder)


def talkative(folder: Path) -> Any:
    """Return a model with random weights, large enough that different pictures get different and winding texts."""
    model = AutoModelForImageTextToText.from_pretrained(folder)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and in_decoder(name) and ".layers." in name:
            torch.nn.init.normal_(parameter, std=0.25)
        elif parameter.ndim > 1 and not in_decoder(name) and "lm_head" not in name:
            parameter.data *= 4
    return model.eval()


def in_decoder(name: str) -> bool:
    return any(decoder in name for decoder in DECODERS)


def as_transformers(
    model: Any, collator: Collator, inputs: dict[str, torch.Tensor], images: list[Image.Image]
) -> dict[str, torch.Tensor]:
    """Return the inputs of transformers' own forward pass for a batch of ours, with pictures as its image processor
    makes them; positions and masks are left to it."""
    kind = model.config.model_type
    if kind == "paligemma":
        return inputs
    shown = [[collator.shown(image)] for image in images]
    seen = dict(collator.processor.image_processor(shown, return_tensors="pt"))
    seen.pop("num_crops", None)
    if kind not in ("smolvlm", "idefics3"):
        name = "token_type_ids" if kind == "gemma3" else "mm_token_type_ids"
        seen[name] = (inputs["input_ids"] == collator.image_token).int()
    return {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], **seen}


def prefix_batch(collator: Collator, pictures: Pictures) -> dict[str, torch.Tensor]:
    """Return the inputs of one picture's prefix, of which transformers generates."""
    ids = torch.tensor(collator.prefixes(pictures))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
        **pictures,
    }


def generated(model: Any, collator: Collator, image: Image.Image) -> list[int]:
    """Return what transformers writes for a picture alone, up to the token that stops it."""
    inputs = as_transformers(model, collator, prefix_batch(collator, collator.pictures([image])), [image])
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    output = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


# --- layout


def test_every_type_in_the_table_has_a_small_model_here():
    assert set(SAVED) == set(FAMILIES)


def test_labels_are_the_answer_and_the_token_that_stops_it(collator):
    batch = collator(EXAMPLES)
    prefixes = collator.prefixes(collator.pictures(IMAGES))
    for example, labels, ids, prefix in zip(EXAMPLES, batch.labels, batch.inputs["input_ids"], prefixes):
        learned = labels[labels != IGNORE].tolist()
        assert learned[-1] == collator.stop and collator.stop not in learned[:-1]
        assert collator.texts([learned]) == [collator.lead + canonical(example.target)]
        assert (labels[: len(prefix)] == IGNORE).all() and ids[: len(prefix)].tolist() == prefix
        assert (labels != IGNORE).nonzero()[0].item() == len(prefix)
        assert prefix[-1] == collator.last and len(prefix) <= collator.longest_prefix


def test_image_tokens_are_counted_from_width_and_height(collator):
    pictures = collator.pictures(IMAGES)
    for size, prefix in zip(SIZES, collator.prefixes(pictures)):
        count, scale = collator.image_tokens(*size)
        assert prefix.count(collator.image_token) == count
        shown = collator.seen(collator.pictures([noise(0, size)])).size
        assert scale == pytest.approx(min(a / b for a, b in zip(shown, size)), rel=0.35)


def test_the_picture_that_the_model_sees_is_that_of_the_example(collator):
    half = Image.new("RGB", (64, 64), "black")
    half.paste("white", (32, 0, 64, 64))
    seen = np.asarray(collator.seen(collator.pictures([half])).convert("L"))
    height, width = seen.shape
    assert seen[:, : width // 2 - 2].max() < 20 and seen[:, width // 2 + 2 :].min() > 235
    assert height == width


def test_pictures_are_joined_and_cut_without_a_change(collator):
    whole, alone = collator.pictures(IMAGES), [collator.pictures([image]) for image in IMAGES]
    joined = join_pictures(alone)
    assert joined.keys() == whole.keys() and all(torch.equal(joined[name], whole[name]) for name in whole)
    batch = collator(EXAMPLES)
    for part, example in zip(batch.cut(1), EXAMPLES):
        single = collator([example])
        assert torch.equal(part.labels, single.labels)
        for name in ("input_ids", "attention_mask", "token_type_ids", "position_ids"):
            assert name not in batch.inputs or torch.equal(part.inputs[name], single.inputs[name]), name


# --- the pass in training


def test_an_answer_token_changes_no_logit_before_it(model, collator):
    family, batch = family_of(model.config), collator(EXAMPLES[:2])
    with torch.no_grad():
        before = family.hidden_states(model, batch.inputs)
        for position in (batch.labels[0] != IGNORE).nonzero().flatten().tolist()[:5]:
            ids = batch.inputs["input_ids"].clone()
            ids[0, position] = (ids[0, position] + 1) % 250
            after = family.hidden_states(model, {**batch.inputs, "input_ids": ids})
            assert torch.equal(after[:, :position], before[:, :position])
            assert not torch.equal(after[0, position:], before[0, position:])
            assert torch.equal(after[1], before[1])


def adapted(folder: Path, target_modules: str = "both") -> Any:
    options = TrainConfig.from_values({"model": str(folder), "r": 4, "target_modules": target_modules}).model
    lora = add_lora(load_base(str(folder), "fp32", "none", torch.device("cpu")), options, seed=0)
    for parameter in trained(lora):
        torch.nn.init.normal_(parameter, std=0.05)
    return lora


def gradients(lora: Any) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in lora.named_parameters() if parameter.grad is not None}
    lora.zero_grad()
    return found


def test_loss_and_gradients_are_those_of_transformers(folder, collator):
    lora, batch = adapted(folder), collator(EXAMPLES)
    count = int((batch.labels != IGNORE).sum())
    output = lora(**as_transformers(lora, collator, batch.inputs, IMAGES), labels=batch.labels)
    output.loss.backward()
    expected = gradients(lora)
    assert len(expected) == len(trained(lora))
    for size in (4, 2, 1):  # any split of a step
        loss = torch.zeros(())
        for part in batch.cut(size):
            share = summed_loss_of(lora, part) / count
            share.backward()
            loss += share.detach()
        assert loss.item() == pytest.approx(output.loss.item(), rel=1e-5)
        found = gradients(lora)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_padding_changes_nothing(model, collator):
    family, batch = family_of(model.config), collator(EXAMPLES[:3])
    more = batch.padded(64)
    assert more.labels.shape[1] % 64 == 0
    with torch.no_grad():
        short, long = (family.hidden_states(model, each.inputs) for each in (batch, more))
    real = batch.inputs["attention_mask"].bool()
    torch.testing.assert_close(long[:, : real.shape[1]][real], short[real], rtol=1e-4, atol=1e-5)


# --- decoding


@pytest.fixture(scope="session")
def expected(model, collator) -> list[list[int]]:
    rows = [generated(model, collator, image) for image in IMAGES]
    assert len({tuple(row) for row in rows}) > len(rows) // 2
    return rows


@pytest.mark.parametrize("fixed", [False, True], ids=["", "fixed rows"])
def test_texts_are_those_of_transformers(model, collator, expected, fixed):
    """Pictures of different sizes side by side, with right drafts, another's, and none."""
    pictures = [collator.pictures([image]) for image in IMAGES]
    for sources in ([[]] * len(IMAGES), expected, [*expected[1:], expected[0]]):
        decoder = Decoder(model, collator, slots=3)
        decoder.fixed = fixed
        requests = [
            Request(lambda i=i: pictures[i], NEW, sources[i])  # type: ignore[misc]
            for i in range(len(IMAGES))
        ]
        answers = dict(decoder.answers(requests, NEW, NEW))
        assert [answers[i].tokens for i in range(len(IMAGES))] == expected


def test_log_probabilities_are_those_of_a_pass_over_the_answer(model, collator, expected):
    for image, tokens, answer in zip(IMAGES, expected, Decoder(model, collator)(collator.pictures(IMAGES), NEW)):
        prefix = prefix_batch(collator, collator.pictures([image]))
        if collator.image_token in tokens:
            continue  # transformers would look for a picture there
        start, ids = prefix["input_ids"].shape[1], torch.tensor([tokens])
        text = {"input_ids": torch.cat([prefix["input_ids"], ids], 1)}
        text["attention_mask"] = torch.ones_like(text["input_ids"])
        text["token_type_ids"] = (torch.arange(start + len(tokens)) >= start).long()[None]
        with torch.no_grad():
            logits = model(**as_transformers(model, collator, {**prefix, **text}, [image])).logits[0, start - 1 : -1]
        wanted = logits.log_softmax(-1).gather(1, ids.T)[:, 0]
        assert answer.logprobs == pytest.approx(wanted.tolist(), abs=1e-4)


# --- weights


@pytest.mark.parametrize("target_modules", ["language", "both"])
def test_a_merged_copy_computes_what_base_and_adapter_compute(folder, collator, target_modules):
    lora, batch = adapted(folder, target_modules).eval(), collator(EXAMPLES)
    merged, base = merged_copy(lora, torch.float32), lora.get_base_model()
    family = family_of(base.config)
    with torch.no_grad():
        found = merged.lm_head(family.hidden_states(merged, batch.inputs))
        wanted = base.lm_head(family.hidden_states(base, batch.inputs))
    real = batch.inputs["attention_mask"].bool()
    torch.testing.assert_close(found[real], wanted[real], rtol=1e-3, atol=1e-4)


def test_layers_in_4_bits_are_all_linear_ones_but_the_head(folder):
    base = load_base(str(folder), "fp32", "nf4", torch.device("cpu"))
    packed = {name for name, parameter in base.named_parameters() if parameter.dtype == torch.uint8}
    linear = {f"{name}.weight" for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    assert packed == linear - {"lm_head.weight"}
    assert {in_decoder(name) for name in packed} == {True, False}


LANGUAGE = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
SIGLIP = {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}
TOWERS = {
    "paligemma": SIGLIP,
    "qwen3_vl": {"qkv", "proj", "linear_fc1", "linear_fc2"},
    "qwen2_5_vl": {"qkv", "proj", "gate_proj", "up_proj", "down_proj"},
    "gemma3": SIGLIP,
    "smolvlm": SIGLIP,
    "idefics3": SIGLIP,
    "paddleocr_vl": SIGLIP,
}


def test_lora_is_where_target_modules_say(kind, folder):
    for wanted, towers in (("language", set()), ("both", TOWERS[kind])):
        names = [name.split(".lora_A")[0] for name, _ in adapted(folder, wanted).named_parameters() if "lora_A" in name]
        language = [name for name in names if in_decoder(name)]
        assert {name.rsplit(".", 1)[-1] for name in language} == LANGUAGE
        assert {name.rsplit(".", 1)[-1] for name in names if name not in language} == towers
        assert len(names) == len(set(names))


def test_the_hub_has_every_weight_once_under_its_name(model, folder):
    """transformers saves under the names on the hub, but for one part of those of SigLIP."""
    named = family_of(model.config).hub_layout(model.state_dict())
    assert len(named) == len(list(model.parameters()))
    with safe_open(folder / "model.safetensors", "pt") as saved:
        assert {name.replace("vision_tower.vision_model.", "vision_tower.") for name in named} == set(saved.keys())


# --- the head of its own


def test_an_untied_head_is_kept_merged_and_exported(tmp_path):
    folder = save_small_chat(tmp_path / "untied", tied=False)
    lora, collator = adapted(folder).eval(), open_collator(str(folder), PROMPT)
    base, merged = lora.get_base_model(), merged_copy(lora, torch.float32)
    assert torch.equal(merged.lm_head.weight, base.lm_head.weight)
    assert not torch.equal(merged.lm_head.weight, merged.get_input_embeddings().weight)
    assert "lm_head.weight" in family_of(base.config).hub_layout(merged.state_dict())
    answers = Decoder(merged, collator)(collator.pictures(IMAGES), 6)
    assert [answer.tokens for answer in answers] == [generated(merged, collator, image)[:6] for image in IMAGES]


# --- what is refused


def test_a_type_that_is_not_supported_is_named_with_those_that_are(cli, tmp_path, small_model):
    folder = Path(shutil.copytree(small_model, tmp_path / "other"))
    (folder / "config.json").write_text(json.dumps({"model_type": "llava"}))
    error = clear_error(cli("train", "--check", "--model", folder, "--output", tmp_path / "page.html"))
    assert error.endswith(f"is of type llava, which is not supported: {', '.join(FAMILIES)} are")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert "is of type llama" in clear_error(cli("train", "--model", folder, "--output", tmp_path / "run"))
    change(folder / "config.json", model_type="idefics3", text_config={"model_type": "granite"})
    error = clear_error(cli("train", "--model", folder, "--output", tmp_path / "run"))
    assert "is of type idefics3 with a language model of type granite, which is not supported. Supported" in error


def test_templates_that_cannot_be_learned_from_are_refused(tmp_path):
    thinking = CHAT_TEMPLATE.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n")
    folder = save_small_chat(tmp_path / "thinking", template=thinking)
    with pytest.raises(UserError, match="does not put an answer directly behind its prompt"):
        open_collator(str(folder), PROMPT)
    folder = save_small_chat(tmp_path / "none")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert open_collator(str(folder), PROMPT).text.endswith("<|im_start|>assistant\n")
    (folder / "chat_template.json").write_text("{}")
    with pytest.raises(UserError, match="has no chat template"):
        open_collator(str(folder), PROMPT)
    (folder / "chat_template.json").unlink()
    with pytest.raises(UserError, match="has no chat template: use an instruct model"):
        open_collator(str(folder), PROMPT)


@pytest.mark.parametrize("template", ["{{ raise_exception('no pictures') }}", "{{", "{{ messages[0].content + 3 }}"])
def test_a_template_that_cannot_be_rendered_is_one_line(tmp_path, template):
    folder = save_small_chat(tmp_path / "broken", template=template)
    with pytest.raises(UserError, match=f"the chat template of {folder} cannot be rendered: "):
        open_collator(str(folder), PROMPT)


def test_the_size_of_an_image_processor_must_be_one_of_pixels(tmp_path):
    folder = save_small_chat(tmp_path / "square")
    config = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps({**config, "size": {"height": 224, "width": 224}}))
    with pytest.raises(UserError, match="must have longest_edge and shortest_edge, and is"):
        open_collator(str(folder), PROMPT)


def test_names_of_layers_that_are_not_linear_are_refused(tmp_path, small_model):
    chat = save_small_chat(tmp_path / "chat")
    for folder, wanted, other in (
        (chat, "qkv,proj", "patch_embed.proj"),
        (chat, ".*proj", "patch_embed.proj"),
        (Path(small_model), ".*(q_proj|embed_tokens)", "embed_tokens"),
    ):
        with pytest.raises(UserError, match=f"also matches .*{other}, which is no linear layer"):
            adapted(folder, wanted)


def test_options_that_mean_nothing_to_a_family_are_refused(cli, small_model, tmp_path):
    flags = ("--model", small_model, "--output", tmp_path / "page.html", "--image-tokens", 100)
    error = clear_error(cli("train", "--check", *flags))
    assert error == "--image-tokens 100: leave it out, every picture takes 4 image tokens with this model"
    flags = ("--model", save_small_chat(tmp_path / "chat"), "--output", tmp_path / "page.html", "--letterbox")
    assert "--letterbox: leave it out" in clear_error(cli("train", "--check", *flags))
    error = clear_error(cli("train", "--check", *flags[:-1], "--prefix-mask", "picture"))
    assert error.startswith("--prefix-mask picture: leave it out, it is PaliGemma's")


def test_an_adapter_of_another_family_is_refused(cli, finished, tmp_path):
    folder = save_small_chat(tmp_path / "chat")
    flags = ("--adapter", finished.adapter, "--model", folder, "--output", tmp_path / "run", "--steps", 1)
    assert "was trained on a model of type paligemma, and --model" in clear_error(cli("train", *flags))
    older = Path(shutil.copytree(finished.adapter, tmp_path / "older"))  # which does not say
    (older / "im2json.json").write_text("{}")
    assert "does not fit this model" in clear_error(cli("train", *flags, "--adapter", older))


def test_a_prompt_that_is_a_control_token_is_refused(tmp_path):
    folder = save_small_chat(tmp_path / "chat")
    with pytest.raises(UserError, match="leave <|im_end|> out, a special token".replace("|", r"\|")):
        open_collator(str(folder), "read <|im_end|>")


# --- dynamic resolution


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("of", ["qwen3_vl", "qwen2_5_vl", "paddleocr_vl", "smolvlm"])
@pytest.mark.parametrize("least", [4, 188])  # image tokens, of the processor
def test_image_tokens_limits_what_a_picture_takes(tmp_path, of, least):
    folder = SAVED[of](tmp_path / "chat")
    if of != "smolvlm":
        size = {"shortest_edge": least * 64, "longest_edge": 4096 * 64}
        change(folder / "preprocessor_config.json", size=size)
    for limit in (20, 100, 200):
        collator = open_collator(str(folder), PROMPT, image_tokens=limit)
        for size in [(1000, 1000), (300, 1500), (90, 4000), (4000, 30), (20, 20), (24, 498), (150, 97), (40, 900)]:
            picture = noise(0, size)
            (prefix,) = collator.prefixes(collator.pictures([picture]))
            counted, _ = collator.image_tokens(*collator.shown(picture).size)
            assert prefix.count(collator.image_token) == counted <= limit
            assert len(prefix) <= collator.longest_prefix


def test_tiles_are_counted_as_the_image_processor_cuts_them(tmp_path):
    rng = random.Random(0)
    for longest in (16, 48, 100):
        folder = save_small_smolvlm(tmp_path / str(longest))
        change(folder / "preprocessor_config.json", size={"longest_edge": longest}, do_image_splitting=False)
        collator = open_collator(str(folder), PROMPT)
        for size in [(rng.randint(8, 300), rng.randint(8, 300)) for _ in range(60)]:
            ((rows, columns),) = collator.grids(collator.pictures([Image.new("RGB", size)]))
            assert collator.image_tokens(*size)[0] == (rows * columns + 1) * 4, size


@pytest.mark.parametrize(
    ("of", "file", "values", "said"),
    [
        ("qwen3_vl", "preprocessor_config.json", {"merge_size": 4}, "merge_size is 4, and .* needs 2"),
        ("qwen2_5_vl", "preprocessor_config.json", {"patch_size": 8}, "patch_size is 8, and .* needs 4"),
        ("gemma3", "preprocessor_config.json", {"size": {"height": 56, "width": 56}}, r"size is \(56, 56\)"),
        ("smolvlm", "preprocessor_config.json", {"max_image_size": {"longest_edge": 32}}, "longest_edge is 32"),
        ("smolvlm", "preprocessor_config.json", {"max_image_size": {"height": 16, "width": 16}}, "is None, and"),
        (
            "qwen2_5_vl",
            "preprocessor_config.json",
            {"temporal_patch_size": 1},
            "temporal_patch_size is 1, and .* needs 2",
        ),
        (
            "qwen3_vl",
            "preprocessor_config.json",
            {"image_mean": 0.5},
            "image_mean .* must be three numbers, and is 0.5",
        ),
        ("smolvlm", "preprocessor_config.json", {"image_std": [1, 1]}, "image_std .* must be three numbers"),
        (
            "paligemma",
            "processor_config.json",
            {"image_processor": {"image_seq_length": 9, "size": {"height": 28, "width": 28}}},
            "image_seq_length is 9, and .* 4:",
        ),
        ("gemma3", "config.json", {"image_token_index": 9, "image_token_id": 9}, "the id of <image_soft_token> is"),
    ],
)
def test_a_processor_that_is_not_the_model_s_is_refused(tmp_path, of, file, values, said):
    folder = SAVED[of](tmp_path / "model")
    change(folder / file, **values)
    with pytest.raises(UserError, match=said):
        open_collator(str(folder), PROMPT)


@pytest.mark.parametrize("of", ["gemma3", "smolvlm", "idefics3"])
def test_features_are_counted_by_the_model_not_by_the_processor_s_file(tmp_path, of):
    folder = SAVED[of](tmp_path / "model")
    (folder / "processor_config.json").unlink()
    collator = open_collator(str(folder), PROMPT)
    pictures = collator.pictures(IMAGES)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    seen = family_of(model.config).look(model, pictures).features.flatten(0, -2)
    assert len(seen) == sum(prefix.count(collator.image_token) for prefix in collator.prefixes(pictures))


def test_pan_and_scan_is_not_done_whatever_the_file_says(tmp_path):
    folder = save_small_gemma3(tmp_path / "gemma")
    change(folder / "preprocessor_config.json", do_pan_and_scan=True, pan_and_scan_min_crop_size=8,
           pan_and_scan_max_num_crops=4, pan_and_scan_min_ratio_to_activate=1.2)  # fmt: skip
    assert len(open_collator(str(folder), PROMPT).pictures([noise(0, (30, 90))])["pixels"]) == 1


@pytest.mark.parametrize("of", ["qwen3_vl", "smolvlm"])
def test_more_image_tokens_than_the_model_holds_are_refused(tmp_path, of):
    folder = SAVED[of](tmp_path / "model")
    held = load_config(str(folder)).get_text_config().max_position_embeddings
    for many in (held, 10**9):
        with pytest.raises(UserError, match=f"--image-tokens {many}: the model holds {held} tokens"):
            open_collator(str(folder), PROMPT, image_tokens=many)


def test_a_limit_below_a_tile_is_refused(tmp_path):
    with pytest.raises(
        UserError, match="--image-tokens 3: a tile takes 4 tokens with this model, so give at least as many"
    ):
        open_collator(str(save_small_smolvlm(tmp_path / "smol")), PROMPT, image_tokens=3)


def test_an_answer_may_begin_with_the_space_of_its_template(tmp_path):
    """SmolVLM2 writes `Assistant:` and an answer after a space: learned and generated alike."""
    collator = open_collator(str(save_small_smolvlm(tmp_path / "smol")), PROMPT)
    assert collator.lead == " " and collator.text.endswith("Assistant:")
    assert collator.texts([collator.target_ids({"total": "9"})]) == [' {"total":"9"}']


def test_a_plain_processor_begins_a_text_with_bos_only_once(tmp_path):
    collator = open_collator(str(save_small_gemma3(tmp_path / "gemma")), PROMPT)
    assert collator.text.startswith("<bos>")  # this tokenizer adds none by itself
    (prefix,) = collator.prefixes(collator.pictures([noise(0, (30, 30))]))
    assert prefix.count(collator.processor.tokenizer.bos_token_id) == 1 and prefix[0] == 2


def test_a_narrow_picture_is_widened_with_white_and_not_squashed(tmp_path):
    collator = open_collator(str(save_small_chat(tmp_path / "chat")), PROMPT)
    strip = Image.new("RGB", (10, 3200), "black")
    seen = np.asarray(collator.seen(collator.pictures([strip])).convert("L"))
    assert seen.shape[0] / seen.shape[1] == pytest.approx(32, rel=0.2)
    assert seen[:, 0].min() > 200 and seen[:, -1].min() > 200  # white on both sides


# --- the commands


CHAT = (
    "--precision", "fp32", "--quant", "nf4", "--r", 4, "--lr", 0.01, "--threads", 1, "--dropout", 0.0,
    "--batch-size", 4, "--microbatch", 2, "--eval-every", 2, "--max-new-tokens", 8,
)  # fmt: skip
LIMIT = ("--image-tokens", 64)


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> str:
    return str(save_small_chat(tmp_path_factory.mktemp("chat") / "small"))


@pytest.fixture(scope="module")
def chat_run(train, chat, dataset, tmp_path_factory) -> RunFolder:
    base = ["--model", chat, "--dataset", dataset, *map(str, CHAT + LIMIT)]
    return train(tmp_path_factory.mktemp("chat-run") / "run", "--steps", 4, base=base)


@pytest.mark.slow
@pytest.mark.parametrize("other", sorted(SAVED.keys() - {"paligemma", "qwen3_vl"}))
def test_other_families_go_through_all_commands(cli, train, resume, dataset, tmp_path, other):
    """Training in two parts, evaluating, extracting, exporting to plain transformers, and answers held to a schema."""
    pytest.importorskip("llguidance")
    model = SAVED[other](tmp_path / "model")
    limit = () if other == "gemma3" else LIMIT
    base = ["--model", str(model), "--dataset", dataset, *map(str, CHAT + limit)]
    checked = cli("train", "--check", *base, "--output", tmp_path / "page.html")
    assert checked.exit_code == 0 and "image tokens" in checked.stdout, checked.output
    planned = cli("train", "--plan", *base, "--steps", 4)
    assert planned.exit_code == 0 and "forecast of memory" in planned.stdout
    whole = train(tmp_path / "whole", "--steps", 4, base=base)
    stopped = train(tmp_path / "stopped", "--steps", 4, "--stop-after", 2, base=base)
    resume(stopped)
    weights = "adapter_model.safetensors"
    assert (stopped.adapter / weights).read_bytes() == (whole.adapter / weights).read_bytes()
    found = cli("evaluate", whole.path, "--json")
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["after"] == pytest.approx(json.loads(whole.result.read_text())["test"]["after"])
    images = sorted((Path(dataset) / "test").glob("*.png"))
    read = CliRunner().invoke(main, ["extract", str(whole.path), *map(str, images)])
    assert read.exit_code == 0, read.output
    rows = [json.loads(line)["text"] for line in read.stdout.splitlines() if line.startswith("{")]
    written = {row.id: row.text for row in whole.predictions("test", "after")}
    assert rows == [written[f"test/{image.name}"] for image in images]
    done = CliRunner().invoke(main, ["export", str(whole.path), "--out", str(tmp_path / "out"), "--parity", "0"])
    assert done.exit_code == 0, done.output
    assert re.search(r"[34] of 4 answers are the run's to the letter", done.output), done.output
    wanted, stops = (GenerationConfig.from_pretrained(folder).eos_token_id for folder in (model, tmp_path / "out"))
    assert {*stops} >= ({*wanted} if isinstance(wanted, list) else {wanted}), (stops, wanted)
    held = train(tmp_path / "held", "--steps", 2, "--constrain", "--max-new-tokens", 60, base=base)
    assert json.loads(held.result.read_text())["test"]["after"]["json_validity"] == 1


def test_a_chat_model_is_trained_evaluated_and_read_with(cli, chat_run, dataset, tmp_path):
    usage = json.loads((chat_run.adapter / "im2json.json").read_text())
    assert usage["image_tokens"] == 64 and usage["prompt"] == PROMPT
    assert {"tokenizer.json", "preprocessor_config.json", "chat_template.jinja"} <= {
        path.name for path in chat_run.adapter.iterdir()
    }
    found = cli("evaluate", chat_run.path, "--json")
    assert found.exit_code == 0, found.output
    result = json.loads(chat_run.result.read_text())
    assert json.loads(found.stdout)["after"] == pytest.approx(result["test"]["after"])
    written = {row.id: row.text for row in chat_run.predictions("test", "after")}
    images = sorted((Path(dataset) / "test").glob("*.png"))
    read = CliRunner().invoke(main, ["extract", str(chat_run.path), *map(str, images)])
    assert read.exit_code == 0, read.output
    rows = [json.loads(line) for line in read.stdout.splitlines() if line.startswith("{")]
    assert [row["text"] for row in rows] == [written[f"test/{image.name}"] for image in images]


def test_a_chat_run_goes_on_to_the_same_bits(train, resume, chat, chat_run, dataset, tmp_path):
    base = ["--model", chat, "--dataset", dataset, *map(str, CHAT + LIMIT)]
    stopped = train(tmp_path / "stopped", "--steps", 4, "--stop-after", 2, base=base)
    resume(stopped)
    weights = "adapter_model.safetensors"
    assert (stopped.adapter / weights).read_bytes() == (chat_run.adapter / weights).read_bytes()


def test_check_and_plan_know_the_size_of_pictures(cli, chat, dataset, tmp_path):
    flags = ("--model", chat, "--dataset", dataset)
    checked = cli("train", "--check", *flags, "--output", tmp_path / "page.html")
    assert checked.exit_code == 0, checked.output
    assert re.search(r"every picture takes \d+ image tokens", checked.stdout)
    sized = Path(shutil.copytree(dataset, tmp_path / "sized"))
    noise(0, (70, 30)).save(sized / "train" / "3.png")
    checked = cli("train", "--check", "--model", chat, "--dataset", sized, "--output", tmp_path / "page.html")
    assert re.search(r"pictures take \d+ to \d+ \(median \d+\) image tokens, and \d+ to \d+", checked.stdout)
    assert "&lt;|image_pad|&gt; x " in (tmp_path / "page.html").read_text()
    planned = cli("train", "--plan", *flags, *CHAT, *LIMIT, "--steps", 4)
    assert planned.exit_code == 0 and "forecast of memory" in planned.stdout


@pytest.mark.slow
def test_plain_transformers_reads_what_was_exported_as_the_run_did(cli, chat_run, tmp_path):
    done = CliRunner().invoke(main, ["export", str(chat_run.path), "--out", str(tmp_path / "out"), "--parity", "0"])
    assert done.exit_code == 0, done.output
    assert re.search(r"[34] of 4 answers are the run's to the letter", done.output), done.output  # bf16 may break a tie
    config = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert config["size"]["longest_edge"] == 64 * 64


@pytest.mark.slow
def test_constrained_answers_of_a_chat_model_are_valid(train, chat, dataset, tmp_path):
    pytest.importorskip("llguidance")
    base = ["--model", chat, "--dataset", dataset, *map(str, CHAT + LIMIT)]
    run = train(tmp_path / "run", "--steps", 2, "--constrain", "--max-new-tokens", 60, base=base)
    result = json.loads(run.result.read_text())
    assert result["test"]["after"]["json_validity"] == 1


@pytest.mark.slow
def test_two_processes_train_a_chat_model_as_one_does(chat, chat_run, dataset, tmp_path):
    run = RunFolder(tmp_path / "two")
    launch("train", "--output", run.path, "--model", chat, "--dataset", dataset, *CHAT, *LIMIT, "--steps", 4)
    assert len(metrics(run)) == len(metrics(chat_run))
    for got, wanted in zip(metrics(run), metrics(chat_run)):
        assert (got["step"], got["split"], got.get("stage")) == (wanted["step"], wanted["split"], wanted.get("stage"))
        assert got["values"] == pytest.approx(wanted["values"], rel=1e-3, abs=1e-6)


@pytest.mark.slow
def test_a_sweep_compares_chat_models(chat, dataset, tmp_path):
    base = {flag[2:].replace("-", "_"): value for flag, value in zip((CHAT + LIMIT)[::2], (CHAT + LIMIT)[1::2])}
    base |= {"model": chat, "dataset": dataset, "steps": 2, "eval_every": 2}
    grid = {"base": base, "ablate": {"r": [4, 2]}}
    (tmp_path / "grid.json").write_text(json.dumps(grid))
    done = CliRunner().invoke(main, ["sweep", str(tmp_path / "grid.json"), "--output", str(tmp_path / "sweep")])
    assert done.exit_code == 0, done.output
    assert len(json.loads((tmp_path / "sweep" / "summary.json").read_text())["settings"]) == 2


def test_a_batch_keeps_its_rows_on_another_device(collator):
    batch = collator(EXAMPLES).to(torch.device("meta"))
    assert isinstance(batch, Batch) and all(value.is_meta for value in batch.inputs.values())
    assert replace(batch, ids=[]).labels.is_meta
