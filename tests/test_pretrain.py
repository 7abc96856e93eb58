"""Pre-training: its forward pass is the standard one, its mixture gives nothing away, and it runs on a CPU."""

import collections
import json
import random
import re

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import PaliGemmaForConditionalGeneration, PaliGemmaProcessor

from im2json.data.page import Cell, Line
from im2json.data.receipts import CONTENT_CLASSES, OTHER_CLASS, content_class, draw_receipt, render
from im2json.pretrain import forms, mixture
from im2json.pretrain.__main__ import main
from im2json.pretrain.evaluate import Reading, error_rate, summary
from im2json.pretrain.mixture import ALPHABET, Batches, draw_sample, encode, pixels, stack
from im2json.pretrain.model import IMAGE_TOKENS, Reader, build_model, build_processor
from im2json.pretrain.nf4 import round_to_nf4, rounded
from im2json.pretrain.optimizer import build_optimizers, orthogonalise, set_rate, tower_matrices
from im2json.pretrain.tokenizer import build_tokenizer
from im2json.pretrain.train import text_loss

TARGET_KEYS = [
    "menu", "nm", "num", "unitprice", "cnt", "discountprice", "price", "sub",
    "sub_total", "subtotal_price", "discount_price", "service_price", "tax_price",
    "total", "total_price", "cashprice", "changeprice", "creditcardprice", "menuqty_cnt",
]  # fmt: skip


@pytest.fixture(scope="module")
def processor():
    return build_processor(build_tokenizer())


@pytest.fixture(scope="module")
def reader(processor):
    torch.manual_seed(0)
    return Reader(build_model(processor.tokenizer, "toy"), ALPHABET).eval()


@pytest.fixture(scope="module")
def samples():
    return [draw_sample(0, index) for index in range(1500)]


def keys_of(value):
    if isinstance(value, dict):
        return {*value, *(key for child in value.values() for key in keys_of(child))}
    return {key for child in value for key in keys_of(child)} if isinstance(value, list) else set()


def test_the_extraction_stays_unseen(samples):
    """No prompt like the one that fine-tuning teaches, no key of its target, and not its content either."""
    for sample in samples:
        assert not re.search(r"extract|json|receipt|parse|menu", sample.prompt, re.IGNORECASE)
        assert sample.prompt in ("ocr", "lines", "rows") or sample.prompt.split()[0] in ("form", "keys", "line")
    keys = {key for form in forms.fixed_forms() for section in form.sections for key in (section.key, *section.keys)}
    for sample in samples:
        if sample.prompt.startswith(("form", "keys", "lines", "rows")):
            keys |= keys_of(json.loads(sample.answer))
            keys |= set(sample.prompt.split()[1:])
    assert len(keys) > 500
    assert not keys & set(TARGET_KEYS)
    assert not any(word in key for key in keys for word in ("price", "total", "menu", "cnt"))
    for index in range(200):
        first = draw_receipt(0, mixture.SPLIT, index).target["menu"]
        first = first[0] if isinstance(first, list) else first
        assert content_class(first["nm"], first["price"]) == OTHER_CLASS not in CONTENT_CLASSES.values()


def test_shares_of_the_mixture(samples):
    kinds = collections.Counter(sample.prompt.split()[0] for sample in samples)
    assert 0.6 < kinds["ocr"] / len(samples) < 0.72
    asked = sum(kinds[kind] for kind in ("form", "keys", "lines", "rows"))
    assert 0.25 < asked / len(samples) < 0.35
    assert len({sample.prompt for sample in samples if sample.prompt.startswith("form")}) == forms.FORMS
    values = [json.loads(s.answer) for s in samples if s.prompt.startswith("form")]
    assert any(isinstance(value, list) for value in values)
    assert any(isinstance(child, list) for value in values if isinstance(value, dict) for child in value.values())
    assert any(isinstance(child, dict) for value in values if isinstance(value, dict) for child in value.values())


def test_same_arguments_same_sample():
    first, second = draw_sample(1, 5), draw_sample(1, 5)
    assert (first.prompt, first.answer) == (second.prompt, second.answer)
    assert np.array_equal(first.page.gray, second.page.gray)


def test_a_form_fills_from_rows():
    lines = [Line((Cell("SHOP"),)), Line((Cell("2x tea"), Cell("4.00"))), Line((Cell("1x pie"), Cell("3.00")))]
    section = forms.Section("rows", "several cells", "objects", "first word", ("n", "what", "much"), (1, 0, 2), False)
    assert section.fill(lines) == [
        {"what": "tea", "n": "2x", "much": "4.00"},
        {"what": "pie", "n": "1x", "much": "3.00"},
    ]
    alone = forms.Section("one", "one cell", "objects", "", ("what",), (0,), unwrap=True)
    assert forms.Form("x", (section, alone)).fill(lines[:1]) == '{"one":{"what":"SHOP"}}'
    assert forms.PICKS["ends in a number"](lines) == lines[1:]


def test_layout_is_the_processors(processor):
    """BOS, prompt, newline, answer and EOS come out as PaliGemmaProcessor writes them, and so do the pixels."""
    sample = next(sample for index in range(99) if (sample := draw_sample(2, index)).page.tint != (1.0, 1.0, 1.0))
    mine = encode(sample, processor.tokenizer)
    theirs = processor(
        images=sample.page.image, text="<image>" + sample.prompt, suffix=sample.answer, return_tensors="pt"
    )
    assert mine.tokens == theirs["input_ids"][0, IMAGE_TOKENS:].tolist()
    assert mine.prompt_length == int((theirs["token_type_ids"][0] == 0).sum()) - IMAGE_TOKENS
    batch = stack([mine], len(mine.tokens), 0)
    assert torch.allclose(pixels(batch["gray"], batch["tint"]), theirs["pixel_values"], atol=1e-5)


def test_forward_is_the_standard_classes(processor, reader):
    """Logits and loss equal those of PaliGemma's own forward with token_type_ids."""
    drawn = [sample for index in range(30) if len((sample := draw_sample(3, index)).answer) < 100][:3]
    encoded = [encode(sample, processor.tokenizer) for sample in drawn]
    batch = stack(encoded, max(len(sample.tokens) for sample in encoded), processor.tokenizer.pad_token_id)
    with torch.no_grad():
        logits, cells = reader(pixels(batch["gray"], batch["tint"]), batch["tokens"], batch["prompt_lengths"])
        inputs = processor(
            images=[sample.page.image for sample in drawn], text=["<image>" + sample.prompt for sample in drawn],
            suffix=[sample.answer for sample in drawn], padding=True, return_tensors="pt",
        )  # fmt: skip
        theirs = reader.model(**inputs)
    asked = inputs["attention_mask"][:, IMAGE_TOKENS:].bool()
    assert torch.allclose(logits[asked], theirs.logits[:, IMAGE_TOKENS:][asked], atol=1e-4)
    assert torch.allclose(text_loss(logits, batch), theirs.loss, atol=1e-4)
    assert cells.shape == (3, IMAGE_TOKENS, 6, ALPHABET)


def test_read_out_targets_are_the_printed_characters():
    receipt = draw_receipt(9, "test", 3)
    cells = mixture.cell_targets(render(receipt))
    assert cells.shape == (IMAGE_TOKENS, 6)
    printed = collections.Counter(char for char in receipt.text if not char.isspace())
    found = collections.Counter(mixture.CHARACTERS[index - 1] for index in cells.ravel() if index > 0)
    assert found <= printed
    assert found.total() > 0.95 * printed.total()


def test_batches_hold_one_length_bucket(processor):
    stream = iter(Batches(processor.tokenizer, 0, scale=0.02))
    for _, batch in zip(range(4), stream):
        assert batch["tokens"].shape[1] in mixture.BUCKETS
        assert batch["tokens"].shape[0] == round(mixture.BUCKETS[batch["tokens"].shape[1]] * 0.02)
        ends = batch["tokens"].gather(1, batch["lengths"][:, None] - 1)
        assert (ends == processor.tokenizer.eos_token_id).all()


def test_orthogonalise_evens_out_singular_values():
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(3, 64, 32)))
    assert values.shape == (3, 32)
    assert (values > 0.6).all()
    assert (values < 1.3).all()


def test_optimizers_cover_everything_once(reader):
    optimizers = build_optimizers(reader, 0.02, 0.002)
    held = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in reader.parameters())
    assert len(tower_matrices(reader)) == 6 + 7
    assert [set_rate(optimizers, at) for at in (0.2, 0.4, 0.7, 1.0)] == [1.0, 1.0, pytest.approx(0.5), 0.0]
    assert optimizers[0].param_groups[0]["lr"] == 0.0


def test_nf4_is_that_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    weights = torch.randn(64 * 128, generator=torch.Generator().manual_seed(0))
    packed, state = functional.quantize_4bit(weights, blocksize=64, quant_type="nf4")
    assert torch.equal(functional.dequantize_4bit(packed, state).flatten(), round_to_nf4(weights))


def test_rounding_is_undone():
    weight = torch.nn.Parameter(torch.randn(64, 64))
    before = weight.detach().clone()
    with rounded([weight]):
        assert len(weight.unique()) < 16 * 64
        assert not torch.equal(weight, before)
    assert torch.equal(weight, before)


def test_error_rate_is_over_all_characters():
    readings = [Reading("abcd", "abcd", 0.1, "mono"), Reading("ab", "xb", 0.9, "sans")]
    assert error_rate(readings) == 1 / 6
    measured = summary(readings)
    assert measured["cer_worst_tenth"] == 1 / 2
    assert measured["cer_by_font"] == {"mono": 0.0, "sans": 0.5}


def test_the_command_leaves_a_model(tmp_path):
    arguments = (
        f"--output {tmp_path} --size toy --examples 24 --batch-scale 0.01 --evaluations 1 --evaluation-receipts 1 "
        "--final-receipts 1 --workers 0 --device cpu"
    )
    result = CliRunner().invoke(main, arguments.split(), catch_exceptions=False)
    assert result.exit_code == 0
    curve = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert sum("cer" in line for line in curve) == 1
    assert {"step", "examples", "loss", "cer"} <= set(curve[-1])
    assert json.loads((tmp_path / "result.json").read_text())["examples"] >= 24
    model = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    assert len(PaliGemmaProcessor.from_pretrained(tmp_path).tokenizer) == model.config.text_config.vocab_size


def test_random_keys_are_different():
    assert len(set(forms.random_keys(random.Random(0), 50))) == 50
