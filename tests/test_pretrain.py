"""Pre-training: its forward pass is the standard one, its mixture gives nothing away, and it runs on a CPU."""

import collections
import json
import random
import re

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import slow
from transformers import PaliGemmaForConditionalGeneration, PaliGemmaProcessor

from im2json.data.receipts import draw_receipt, render
from im2json.data.receipts.content import CONTENT_CLASSES, OTHER_CLASS, content_class
from im2json.data.receipts.layout import Cell, Line
from im2json.pretrain import content, forms, looks, mixture, pages
from im2json.pretrain.__main__ import main
from im2json.pretrain.evaluate import Reading, error_rate, summary
from im2json.pretrain.mixture import ALPHABET, Batches, draw_sample, encode, pixels, stack
from im2json.pretrain.model import IMAGE_TOKENS, Reader, build_model, build_processor, load_model
from im2json.pretrain.nf4 import round_to_nf4, rounded
from im2json.pretrain.optimizer import build_optimizers, orthogonalise, set_rate, tower_matrices
from im2json.pretrain.tokenizer import build_tokenizer
from im2json.pretrain.train import Settings, Trainer, batches, save, text_loss

TARGET_KEYS = [
    "menu", "nm", "num", "unitprice", "cnt", "discountprice", "price", "sub",
    "sub_total", "subtotal_price", "discount_price", "service_price", "tax_price",
    "total", "total_price", "cashprice", "changeprice", "creditcardprice", "menuqty_cnt",
]  # fmt: skip
CONTENT_PROMPTS = {form.prompt for form in content.content_forms()}
MEANINGS = {  # of the target's fields
    "subtotal_price": "before", "discount_price": "less", "service_price": "served", "tax_price": "state",
    "total_price": "sum", "cashprice": "notes", "changeprice": "back", "creditcardprice": "bank",
    "menuqty_cnt": "pieces",
}  # fmt: skip


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
    for form in content.content_forms():
        keys |= {*form.names, form.rows.below} | {key for _, key in (*form.rows.keys, *form.labels)} - {""}
        keys.discard("")
    assert len(keys) > 500
    assert all(key.isascii() and key.replace("_", "").isalnum() for key in keys)
    assert not keys & set(TARGET_KEYS)
    assert not any(word in key for key in keys for word in ("price", "total", "menu", "cnt"))
    for index in range(200):
        first = draw_receipt(0, pages.SPLIT, index).target["menu"]
        first = first[0] if isinstance(first, list) else first
        assert content_class(first["nm"], first["price"]) == OTHER_CLASS not in CONTENT_CLASSES.values()


def test_shares_of_the_mixture(samples):
    kinds = collections.Counter(sample.prompt.split()[0] for sample in samples)
    assert 0.53 < kinds["ocr"] / len(samples) < 0.63
    asked = sum(kinds[kind] for kind in ("form", "keys", "lines", "rows"))
    assert 0.34 < asked / len(samples) < 0.44
    by_content = sum(sample.prompt in CONTENT_PROMPTS for sample in samples)
    assert by_content > asked / 2
    assert sum(mixture.TASKS.values()) == pytest.approx(1)
    prompts = {sample.prompt for sample in samples if sample.prompt.startswith("form")}
    assert len(prompts) == forms.FORMS + content.CONTENT_FORMS
    assert {form.prompt for form in forms.fixed_forms()} | CONTENT_PROMPTS == prompts
    values = [json.loads(s.answer) for s in samples if s.prompt.startswith("form")]
    assert any(isinstance(value, list) for value in values)
    assert any(isinstance(child, list) for value in values if isinstance(value, dict) for child in value.values())
    assert any(isinstance(child, dict) for value in values if isinstance(value, dict) for child in value.values())


def test_same_arguments_same_sample():
    first, second = draw_sample(1, 5), draw_sample(1, 5)
    assert (first.prompt, first.answer) == (second.prompt, second.answer)
    assert np.array_equal(first.page.gray, second.page.gray)
    assert content.draw_content_form(random.Random(3), "flat") == content.draw_content_form(random.Random(3), "flat")
    tables = [pages.table_lines(random.Random(4), 99) for _ in range(2)]
    assert tables[0] == tables[1]


def test_a_form_fills_from_rows():
    lines = [Line((Cell("SHOP"),)), Line((Cell("2x tea"), Cell("4.00"))), Line((Cell("1x pie"), Cell("3.00")))]
    section = forms.Section("rows", "several cells", "objects", "first word", ("n", "what", "much"), (1, 0, 2), False)
    assert section.fill(lines) == [
        {"what": "tea", "n": "2x", "much": "4.00"},
        {"what": "pie", "n": "1x", "much": "3.00"},
    ]
    alone = forms.Section("one", "one cell", "objects", "", ("what",), (0,), unwrap=True)
    assert forms.Form("x", (section, alone)).answer(lines[:1]) == '{"one":{"what":"SHOP"}}'
    assert forms.PICKS["ends in a number"](lines) == lines[1:]


def test_target_shapes_are_known():
    for index in range(200):
        target = draw_receipt(0, "train", index).target
        assert forms.has_target_shape(target)
        assert forms.has_target_shape({"a": [target]})
        assert forms.has_target_shape(dict(reversed(target.items())))
    assert not forms.has_target_shape({"a": [{"b": "c"}], "d": "e"})
    assert not forms.has_target_shape([[{"a": "b"}], {"c": "d"}])
    assert not forms.has_target_shape({"a": {"b": "c"}})


@pytest.mark.parametrize("start", [0, *slow(250, 500, 1000, 2000)])
def test_no_answer_has_the_targets_shape(start):
    """Over thousands of pages, those of the curriculum's slices too; and forms by content never need the guard."""
    rng = random.Random(start)
    for index in range(start, 2 * start or 250):
        lines, _ = pages.draw_lines(rng, 0, index, rng.choice((2, 5, 9, 99)), 0.1, 0.4)
        for form in rng.sample(content.content_forms(), 8):
            assert not forms.has_target_shape(form.fill(lines)), form
        _, answer = mixture._ask(rng, forms.fixed_forms(), lines)
        assert not forms.has_target_shape(json.loads(answer))


def test_answers_fit_the_buckets(samples, processor):
    longest = max(mixture.BUCKETS)
    asked = [sample for sample in samples if sample.prompt in CONTENT_PROMPTS]
    assert sum(len(encode(sample, processor.tokenizer).tokens) > longest for sample in asked) < 0.03 * len(asked)


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("x2", "count"), ("2x", "count"), ("2X", "count"), ("2", "count"), ("12", "count"),
        ("41.000", "amount"), ("Rp 41.000", "amount"), ("Rp.1,250", "amount"), ("$12.50", "amount"),
        ("82000", "amount"),
        ("@93,500", "rate"), ("-1,65", "negative"), ("-Rp 4.500", "negative"), ("10%", "percent"),
        ("05/11/2023", "date"), ("2023-11-05", "date"), ("05.11.23", "date"), ("19:07", "time"),
        ("Tel 021-5551234", "phone"),
        ("Nasi Goreng", "words"), ("Table 12", "words"), ("3x Nasi", "count words"), ("Nasi x3", "words count"),
        ("2 @93,500", "count rate"), ("2 2500", "count amount"), ("4821 Nasi", "code words"),
        ("2x 4821 Nasi", "count code words"), ("+ Cheese", "words"), ("Disc 10%", "words percent"),
        ("100 Main St.", "words"),
    ],
)  # fmt: skip
def test_kinds_are_told_by_looks(text, kinds):
    assert " ".join(part.kind for part in looks.cell_parts(text)) == kinds


PAGE = [
    Line((Cell("KEDAI 12"),)),
    Line((Cell("05/11/2023"), Cell("19:07", "r", 1.0))),
    Line((Cell("2x Tea"), Cell("8.000", "r", 1.0))),
    Line((Cell("+ Ice", "l", 0.06), Cell("500", "r", 1.0))),
    Line((Cell("+ Sugar", "l", 0.06),)),
    Line((Cell("Disc 10%", "l", 0.06), Cell("-800", "r", 1.0))),
    Line((Cell("Pie"),)),
    Line((Cell("1 3.500", "l", 0.06), Cell("3.500", "r", 1.0))),
    Line((Cell("PPN 11%:"), Cell("1.200", "r", 1.0))),
    Line((Cell("JUMLAH"), Cell("Rp 12.400", "r", 1.0))),
    Line((Cell("3 Items"),)),
    Line((Cell("Thank you", "c", 0.5),)),
]


def test_a_page_is_read_by_looks():
    found = list(looks.entries(PAGE))
    assert [entry.what for entry in found] == ["rest", "rest", "row", "row", "label", "label", "label", "rest"]
    assert [entry.meaning for entry in found[4:7]] == ["state", "sum", "pieces"]
    assert [[part.text for part in below] for below in found[2].below] == [
        ["Ice", "500"], ["Sugar"], ["Disc", "10%", "-800"],
    ]  # fmt: skip
    assert [part.kind for part in looks.only_last_amount(found[3].parts)] == ["words", "count", "rate", "amount"]


def test_a_form_fills_by_content():
    keys = (("amount", "am"), ("words", "wo"), ("count", "co"), ("rate", "ra"), ("negative", "ne"))
    rows = content.RowKeys(keys, False, "be", below_texts=False, listed=False, negative_inside=True)
    form = content.ContentForm(
        "form x", "beside", rows, (("sum", "su"), ("state", "st")), False, tuple("abcde"), True, True, False
    )
    assert form.fill(PAGE) == {
        "a": [
            {"am": "8.000", "wo": "Tea", "co": "2x", "ne": "-800", "be": [{"am": "500", "wo": "Ice"}, {"wo": "Sugar"}]},
            {"am": "3.500", "wo": "Pie", "co": "1", "ra": "3.500"},
        ],
        "su": "Rp 12.400",
        "st": "1.200",
    }
    assert list(form.fill(PAGE)) == ["a", "su", "st"]
    assert form.fill(PAGE[6:8]) == {"a": {"am": "3.500", "wo": "Pie", "co": "1", "ra": "3.500"}}
    assert content.SHAPES["named"](form, list(looks.entries(PAGE))) == {"su": "Rp 12.400", "st": "1.200"}


def test_the_order_of_a_row_is_not_the_targets():
    orders = [[kind for kind, _ in form.rows.keys] for form in content.content_forms()]
    for order in orders:
        kept = [kind for kind in order if kind in content.TARGET_ORDER]
        assert kept != [kind for kind in content.TARGET_ORDER if kind in order]
    assert {form.shape for form in content.content_forms()} == set(content.SHAPES)


def test_every_label_of_a_receipt_has_a_meaning():
    """Each field's value stands beside a label of that field's meaning, and all labels of a meaning are printed."""
    printed = set()
    for index in range(800):
        receipt = draw_receipt(0, pages.SPLIT, index)
        fields = [*receipt.target.get("sub_total", {}).items(), *receipt.target["total"].items()]
        labels = [entry for entry in looks.entries(receipt.lines) if entry.what == "label"]
        assert [(label.meaning, label.parts[-1].text) for label in labels] == [
            (MEANINGS[key], value) for key, value in fields
        ], receipt.text
        printed |= {re.sub(r" \d+%$", "", label.text.lower()) for label in labels}
    assert set(MEANINGS.values()) == set(looks.LABELS)
    for label in (label for labels in looks.LABELS.values() for label in labels if label not in ("disc", "promo")):
        assert any(label in text for text in printed), label


def test_items_of_a_receipt_are_rows():
    """What is told by looks agrees with what was printed."""
    for index in range(500):
        receipt = draw_receipt(1, pages.SPLIT, index)
        menu = receipt.target["menu"]
        rows = [entry for entry in looks.entries(receipt.lines) if entry.what == "row"]
        kinds = {"words": "nm", "code": "num", "count": "cnt", "rate": "unitprice", "amount": "price"}
        keys = content.RowKeys(
            tuple(kinds.items()), True, "sub", below_texts=False, listed=False, negative_inside=False
        )
        for item, row in zip(menu if isinstance(menu, list) else [menu], rows, strict=True):
            filled = keys.fill(row)
            discount = [below[-1].text for below in row.below if below[-1].kind == "negative"]
            assert {key: item[key] for key in kinds.values() if key in item} == {
                key: value for key, value in filled.items() if key != "sub"
            }
            assert discount == [item[key] for key in ("discountprice",) if key in item]
            if "sub" in item:
                assert filled["sub"] == item["sub"]


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


def test_continuing_from_given_weights(tmp_path, processor):
    """The weights are those given, pages are whole from the start, and the read-out does not teach at first."""
    torch.manual_seed(3)
    first = build_model(processor.tokenizer, "toy")
    save(first, processor, tmp_path / "first")
    settings = Settings(start=str(tmp_path / "first"), examples=1000, batch_scale=0.002, rate=0.1)
    trainer = Trainer(settings, processor, torch.device("cpu"))
    for name, weight in trainer.reader.model.named_parameters():
        assert torch.equal(weight, first.get_parameter(name).to(torch.bfloat16).float())
    assert max(group["peak"] for o in trainer.optimizers for group in o.param_groups) == pytest.approx(0.002)
    batch = next(iter(batches(settings, processor, 0, torch.device("cpu"))))
    whole = next(iter(Batches(processor.tokenizer, 0, 0.002, curriculum=False)))
    begun = next(iter(Batches(processor.tokenizer, 0, 0.002)))
    assert torch.equal(batch["tokens"], whole["tokens"]) and not torch.equal(whole["gray"], begun["gray"])
    tower = trainer.reader.model.model.vision_tower
    inputs = pixels(batch["gray"], batch["tint"]), batch["tokens"], batch["prompt_lengths"]
    for teach in (False, True):
        trainer.reader.zero_grad()
        trainer.reader(*inputs, teach=teach)[1].sum().backward()
        assert any(p.grad is not None and p.grad.any() for p in tower.parameters()) == teach
    assert torch.isfinite(trainer.step(batch)).all()


def test_weights_that_cannot_be_continued(tmp_path, processor):
    command = ["--from", str(tmp_path), "--output", str(tmp_path / "next")]
    refused = CliRunner().invoke(main, command)
    assert refused.exit_code == 2 and "holds no model" in refused.output
    (tmp_path / "config.json").write_text("{}")
    refused = CliRunner().invoke(main, [*command[:3], str(tmp_path)])
    assert refused.exit_code == 2 and "same folder" in refused.output
    other = build_tokenizer()
    other.add_tokens(["~~"])
    other.save_pretrained(tmp_path)
    build_processor(other).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="another tokenizer"):
        load_model(tmp_path, processor.tokenizer)


@pytest.mark.slow
def test_the_command_continues(tmp_path, processor):
    save(build_model(processor.tokenizer, "toy"), processor, tmp_path / "first")
    common = "--size toy --examples 6 --batch-scale 0.002 --evaluations 1 --evaluation-receipts 1 --final-receipts 1"
    command = [*common.split(), "--workers", "0", "--device", "cpu", "--from", str(tmp_path / "first"), "--output"]
    result = CliRunner().invoke(main, [*command, str(tmp_path / "second")], catch_exceptions=False)
    assert result.exit_code == 0
    assert json.loads((tmp_path / "second" / "result.json").read_text())["settings"]["start"] == str(tmp_path / "first")


def test_random_keys_are_different():
    assert len(set(forms.random_keys(random.Random(0), 50))) == 50
