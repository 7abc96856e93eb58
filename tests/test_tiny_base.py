"""The shipped base: small, real classes, any text, PaliGemma's mask, and it reads."""

import json
from pathlib import Path

import pytest
import torch
from helpers import slow
from transformers import PaliGemmaForConditionalGeneration, PaliGemmaProcessor

import im2json
from im2json.data.receipts import draw_receipt, render
from im2json.pretrain.evaluate import SEED, error_rate, read, transcribe, unseen_receipts
from im2json.pretrain.nf4 import rounded
from im2json.pretrain.optimizer import is_quantised
from im2json.pretrain.tokenizer import build_tokenizer

FOLDER = Path(im2json.__file__).parent / "model" / "tiny"
IMAGE_TOKENS = 256


@pytest.fixture(scope="module")
def processor():
    return PaliGemmaProcessor.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return PaliGemmaForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def inputs(processor):
    image = render(draw_receipt(SEED, "test", 0)).image
    return processor(images=image, text="<image>ocr", suffix="abc def", return_tensors="pt")


def test_small_enough_to_ship(model):
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 16 * 2**20
    assert 7e6 < sum(parameter.numel() for parameter in model.parameters()) < 8.4e6
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight


def test_every_token_has_an_embedding(model, processor):
    assert len(processor.tokenizer) == model.config.text_config.vocab_size
    assert processor.tokenizer.convert_tokens_to_ids("<seg127>") < len(processor.tokenizer)
    assert processor.image_token_id == model.config.image_token_id
    for name in ("pad", "bos", "eos"):
        assert getattr(processor.tokenizer, f"{name}_token_id") == getattr(model.generation_config, f"{name}_token_id")


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "  two  spaces  ", "\n\nlines\n", "tab\tand\r\nreturn", "emoji \N{GRINNING FACE}", "日本語 עברית ñ ▁",
        '{"a":[{"b":"c"},{"b":"\\"d\\""}],"e":{"f":["g","h"]}}', '":"', '"},{"', "<0x41>", "\x00\x7f\u200b\ufeff",
    ],
)  # fmt: skip
def test_any_text_comes_back(processor, text):
    tokenizer = processor.tokenizer
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_every_character_of_unicode_is_writable(processor):
    tokenizer = processor.tokenizer
    text = "".join(chr(code) for code in range(0x10FFFF) if code % 7 == 0 and not 0xD800 <= code < 0xE000)
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_json_punctuation_is_merged(processor):
    tokenizer = processor.tokenizer
    assert tokenizer.tokenize('{"a":"b","c":[{"d":"e"},{"d":"f"}]}') == [
        '{"', "a", '":"', "b", '","', "c", '":[{"', "d", '":"', "e", '"},{"', "d", '":"', "f", '"}]}'
    ]  # fmt: skip
    assert tokenizer.tokenize("12,000 tea") == list("12,000 tea")


def test_the_tokenizer_is_the_one_that_pretraining_builds(processor):
    mine = json.loads(build_tokenizer().backend_tokenizer.to_str())
    theirs = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    assert mine["model"] == theirs["model"]
    assert mine["decoder"] == theirs["decoder"]


def test_prefix_looks_both_ways_and_suffix_back(model, inputs):
    """A suffix token changes no logit before it; a prompt token changes the image positions."""

    def logits(position=None):
        tokens = inputs["input_ids"].clone()
        if position is not None:
            tokens[0, position] += 1
        kept = {name: value for name, value in inputs.items() if name not in ("labels", "input_ids")}
        with torch.no_grad():
            return model(input_ids=tokens, **kept).logits[0]

    plain = logits()
    suffix = IMAGE_TOKENS + 5  # BOS, o, c, r, newline
    changed = logits(suffix + 3)
    assert torch.equal(plain[: suffix + 3], changed[: suffix + 3])
    assert not torch.allclose(plain[suffix + 3 :], changed[suffix + 3 :])
    assert not torch.allclose(plain[:IMAGE_TOKENS], logits(IMAGE_TOKENS + 2)[:IMAGE_TOKENS])


@pytest.mark.parametrize("count", [2, *slow(8)])
def test_it_reads(model, processor, count):
    """A few of the receipts that the README's error rate is measured on."""
    assert error_rate(read(model, processor, unseen_receipts(count))) <= 0.01


@pytest.mark.slow
def test_it_reads_in_16_bit(processor):
    model = PaliGemmaForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.bfloat16).eval()
    assert error_rate(read(model, processor, unseen_receipts(8))) <= 0.02


@pytest.mark.slow
def test_it_reads_quantised(model, processor):
    """Weights as QLoRA holds them, in plain bfloat16 layers."""
    weights = [module.weight for name, module in model.named_modules() if is_quantised(name, module)]
    with rounded(weights):
        assert error_rate(read(model, processor, unseen_receipts(20))) <= 0.02


@pytest.mark.parametrize("count", [1, *slow(3)])
def test_an_unknown_prompt_gets_no_target(model, processor, count):
    """Before fine-tuning the base has neither the target's keys nor its shape to offer."""
    for text in transcribe(model, processor, unseen_receipts(count), prompt="extract JSON.", max_new_tokens=60):
        assert '"menu"' not in text
        assert '"total_price"' not in text
