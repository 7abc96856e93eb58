"""Batches: the layout that PaliGemma was trained with, nothing cut, nothing taken for a special token."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import prefix_inputs, write_dataset
from PIL import Image
from transformers import PaliGemmaProcessor

from im2json.data.collate import IGNORE, Collator
from im2json.data.example import Example
from im2json.data.lengths import Measured, TargetLengths, TargetMeter
from im2json.data.loader import StepLoader
from im2json.data.order import Order, Share
from im2json.data.pictures import on_square
from im2json.data.sources import load_splits
from im2json.families.paligemma import PaliGemmaCollator
from im2json.jsontext import canonical

PROMPT = "extract JSON."
TARGETS = [{"total": "9.30"}, {"b": [{"nm": "é – 日本"}, {}], "a": None}, {}, {"x": "y" * 90}]


def noise(seed: int, size: tuple[int, int] = (30, 20)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


EXAMPLES = [Example(f"e{i}", noise(i, (20 + i, 30)), target) for i, target in enumerate(TARGETS)]


@pytest.fixture(scope="module")
def processor(small_model) -> PaliGemmaProcessor:
    return PaliGemmaProcessor.from_pretrained(small_model)


@pytest.fixture(scope="module")
def collator(processor) -> Collator:
    return PaliGemmaCollator(processor, PROMPT)


def reference(processor: PaliGemmaProcessor, example: Example) -> dict[str, torch.Tensor]:
    """What transformers' processor makes of an example with its target as the suffix."""
    return processor(
        images=example.image, text=f"<image>{PROMPT}", suffix=canonical(example.target), return_tensors="pt"
    )


def test_same_tokens_as_the_processor_with_a_suffix(processor, collator):
    for example in EXAMPLES:
        batch, expected = collator([example]), reference(processor, example)
        assert batch.ids == [example.id]
        assert set(batch.inputs) == {"input_ids", "attention_mask", "token_type_ids", "pixel_values"}
        for name, value in batch.inputs.items():
            assert torch.equal(value, expected[name].to(value.dtype)), name
        assert torch.equal(batch.labels, expected["labels"])


def test_a_batch_is_its_examples_padded_on_the_right(processor, collator):
    batch = collator(EXAMPLES)
    singles = [collator([example]) for example in EXAMPLES]
    longest = max(single.labels.shape[1] for single in singles)
    assert batch.labels.shape == (len(EXAMPLES), longest)
    assert torch.equal(batch.inputs["pixel_values"], torch.cat([s.inputs["pixel_values"] for s in singles]))
    for row, single in enumerate(singles):
        end = single.labels.shape[1]
        for name in ("input_ids", "attention_mask", "token_type_ids"):
            assert torch.equal(batch.inputs[name][row, :end], single.inputs[name][0]), name
        assert torch.equal(batch.labels[row, :end], single.labels[0])
        assert (batch.inputs["input_ids"][row, end:] == processor.tokenizer.pad_token_id).all()
        assert (batch.inputs["attention_mask"][row, end:] == 0).all()
        assert (batch.labels[row, end:] == IGNORE).all()


def test_labels_are_the_target_and_eos_and_nothing_else(processor, collator):
    batch = collator(EXAMPLES)
    tokenizer = processor.tokenizer
    for row, example in enumerate(EXAMPLES):
        labels = batch.labels[row]
        learned = labels[labels != IGNORE]
        assert learned[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in learned[:-1]
        assert json.loads(tokenizer.decode(learned[:-1])) == example.target
        first = int((labels != IGNORE).nonzero()[0])
        assert first == len(collator.prefix_ids)
        assert (batch.inputs["token_type_ids"][row] == (torch.arange(len(labels)) >= first)).all()
        prompt = tokenizer.decode(batch.inputs["input_ids"][row, :first])
        assert prompt == "<image>" * processor.image_seq_length + f"<bos>{PROMPT}\n"


@pytest.mark.parametrize("name", ["<eos>", "<pad>", "<image>", "<bos>"])
def test_a_special_token_in_a_target_is_spelled_out(processor, collator, name):
    """As the processor does not do: it would learn to end, or see a picture, in the middle of a target."""
    tokenizer = processor.tokenizer
    target = {"nm": f"a {name} b"}
    ids = collator.target_ids(target)
    special = tokenizer.convert_tokens_to_ids(name)
    assert special in tokenizer(name, add_special_tokens=False)["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id
    assert special not in ids[:-1]
    assert json.loads(tokenizer.decode(ids, skip_special_tokens=True)) == target


@pytest.mark.parametrize("text", ["<loc0001>", "<seg001>", "\\n\n\t", "\u2028 é 日本 \U0001f600", " a  b ", "<0x41>"])
def test_any_text_comes_back_as_it_was(processor, collator, text):
    ids = collator.target_ids({text: [text]})
    assert json.loads(processor.tokenizer.decode(ids, skip_special_tokens=True)) == {text: [text]}


def test_generation_starts_from_the_prefix_that_training_used(processor, collator):
    images = [example.image for example in EXAMPLES]
    prefixes, batch = prefix_inputs(collator, collator.pictures(images)), collator(EXAMPLES)
    length = len(collator.prefix_ids)
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        assert torch.equal(prefixes[name], batch.inputs[name][:, :length]), name
    assert torch.equal(prefixes["pixel_values"], batch.inputs["pixel_values"])
    expected = processor(images=images[0], text=f"<image>{PROMPT}", return_tensors="pt")
    assert torch.equal(prefixes["input_ids"][:1], expected["input_ids"])


def test_targets_are_never_cut(collator):
    long = Example("long", noise(0), {"text": "z" * 5000})
    assert len(collator.target_ids(long.target)) == len(canonical(long.target)) + 1
    assert int((collator([long, EXAMPLES[0]]).labels[0] != IGNORE).sum()) == len(canonical(long.target)) + 1


def test_lengths_are_counted_and_limits_say_how_many_and_how_long(collator, dataset):
    splits = load_splits(dataset)
    counted = {name: [len(canonical(t).encode()) + 1 for t in split.targets] for name, split in splits.items()}
    meter = TargetMeter(collator, 2048)
    lengths = TargetLengths({name: [meter(t).tokens for t in split.targets] for name, split in splits.items()})
    assert lengths.by_split == counted
    everything = [length for values in counted.values() for length in values]
    longest = max(everything)
    assert lengths.longest == longest
    assert f"longest {max(counted['train'])}" in lengths.summary().splitlines()[0]
    assert f"of {np.median(counted['train']):.0f} tokens (median)" in lengths.summary().splitlines()[0]

    assert lengths.new_token_limit(None) == longest + longest // 8
    assert lengths.new_token_limit(7) == 7


def test_a_target_fits_to_the_token_or_its_row_is_refused(collator):
    target = {"text": "z" * 30}
    tokens, prefix = len(collator.target_ids(target)), len(collator.prefix_ids)
    assert TargetMeter(collator, prefix + tokens)(target) == Measured(tokens)
    assert TargetMeter(collator, 2048, tokens)(target) == Measured(tokens)
    problem = TargetMeter(collator, prefix + tokens - 1)(target).problem
    assert problem == f"the target takes {tokens} tokens, and the model holds {tokens - 1} after picture and prompt"
    problem = TargetMeter(collator, 2048, tokens - 1)(target).problem
    assert f"the target takes {tokens} tokens, and --max-target-tokens is {tokens - 1}" in problem
    with pytest.raises(ValueError, match=rf"prompt take up to {prefix} tokens, but the model holds {prefix + 1}."):
        TargetMeter(collator, prefix + 1)


def with_long_row(folder: Path) -> Path:
    """Make the fourth target of train take 5,014 tokens."""
    path = write_dataset(folder) / "train" / "metadata.jsonl"
    lines = path.read_text().splitlines()
    lines[3] = json.dumps({"file_name": "3.png", "ground_truth": {"text": "x" * 5000}})
    path.write_text("\n".join(lines))
    return path


def test_check_and_training_name_a_target_that_the_model_cannot_hold(cli, base_args, small_model, tmp_path):
    rows = with_long_row(tmp_path / "data")
    said = f"{rows}:4: the target takes 5012 tokens, and the model holds "
    flags = [*base_args, "--dataset", tmp_path / "data"]
    page = ("--check", "--model", small_model, "--dataset", tmp_path / "data", "--output", tmp_path / "page.html")
    assert said in cli("train", *page).output
    assert cli("train", *page).exit_code == 1 and cli("train", *page, "--skip-bad", 1).exit_code == 0
    refused = cli("train", *flags, "--output", tmp_path / "run")
    assert refused.exit_code == 1 and not (tmp_path / "run").exists()
    assert "1 of 17 rows cannot be used" in refused.stderr and said in refused.stderr
    left_out = cli("train", *flags, "--skip-bad", 1, "--output", tmp_path / "run", "--steps", 1, "--no-test")
    assert left_out.exit_code == 0, left_out.output
    assert "rows left out, because they are bad: 1 of 17" in left_out.output and said in left_out.output


def test_a_limit_is_refused_before_the_first_step(cli, base_args, tmp_path):
    flags = [*base_args, "--max-target-tokens", 40, "--output", tmp_path / "run"]
    refused = cli("train", *flags)
    assert refused.exit_code == 1 and not (tmp_path / "run").exists()
    assert ".jsonl:8: the target takes 43 tokens, and --max-target-tokens is 40" in refused.stderr


def test_targets_that_the_tokenizer_cannot_write_back_are_named(cli, base_args, small_model, tmp_path):
    """This tokenizer reads a circled digit as the digit, as others do by NFKC or for want of a token."""
    model = Path(shutil.copytree(small_model, tmp_path / "model"))
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    (model / "tokenizer.json").write_text(json.dumps({**tokenizer, "normalizer": {"type": "NFKC"}}))
    rows = write_dataset(tmp_path / "data") / "train" / "metadata.jsonl"
    lines = rows.read_text().splitlines()
    lines[2] = json.dumps({"file_name": "2.png", "ground_truth": {"no": "①"}})
    rows.write_text("\n".join(lines))
    flags = ("--model", model, "--dataset", tmp_path / "data", "--output")
    note = (
        "targets that the tokenizer cannot write back: 1\n"
        f"""  {rows}:3: '{{"no":"①"}}' is learned as '{{"no":"1"}}'"""
    )
    assert note in cli("train", "--check", *flags, tmp_path / "page.html").output
    assert note in cli("train", *base_args, *flags, tmp_path / "run", "--steps", 1, "--no-test").output


def test_pictures_are_squashed_and_not_cropped(collator):
    """A wide picture, dark on its left half and bright on its right, keeps both halves."""
    wide = Image.new("RGB", (400, 50), "black")
    wide.paste("white", (200, 0, 400, 50))
    (pixels,) = collator.pictures([wide])["pixel_values"]  # 3 x H x W
    assert pixels.shape == (3, 28, 28)
    assert pixels[:, :, :10].max() < -0.95 and pixels[:, :, -10:].min() > 0.95


def test_a_letterboxed_picture_keeps_its_shape_on_white(processor):
    collator = PaliGemmaCollator(processor, PROMPT, letterbox=True)
    for size in ((400, 100), (100, 400)):
        (pixels,) = collator.pictures([Image.new("RGB", size, "black")])["pixel_values"]  # 3 x H x W
        tall = pixels if size[0] > size[1] else pixels.transpose(1, 2)
        assert tall.shape == (3, 28, 28)
        assert tall[:, :9].min() > 0.95 and tall[:, -9:].min() > 0.95
        assert tall[:, 12:16].max() < -0.95  # the middle quarter, 7 of 28 lines, from edge to edge
    square = [Image.new("RGB", (50, 50), "red")]
    assert torch.equal(
        collator.pictures(square)["pixel_values"], PaliGemmaCollator(processor, PROMPT).pictures(square)["pixel_values"]
    )
    pictures = [noise(0, (60, 20)), noise(1)]
    examples = [Example(str(i), picture, {}) for i, picture in enumerate(pictures)]
    assert torch.equal(collator(examples).inputs["pixel_values"], collator.pictures(pictures)["pixel_values"])


def test_a_strip_of_paper_is_scaled_down_before_it_would_need_a_vast_square(monkeypatch):
    monkeypatch.setattr("im2json.data.pictures.MAX_PIXELS", 10_000)
    strip = Image.new("RGB", (2, 4000), "black")
    square = on_square(strip)
    assert (square.size, strip.size) == ((100, 100), (2, 4000))
    assert square.getpixel((49, 50)) == (0, 0, 0)
    assert square.getpixel((48, 50)) == square.getpixel((50, 50)) == (255, 255, 255)


def test_a_batch_is_cut_as_if_it_had_been_made_in_parts(collator, dataset):
    split = load_splits(dataset)["train"]
    examples = [split[i] for i in (0, 3, 7, 9, 5)]
    whole = collator(examples)
    assert whole.cut(5) == [whole]
    for most, sizes in ((4, [4, 1]), (2, [2, 2, 1]), (1, [1] * 5)):
        parts = whole.cut(most)
        assert [len(part.ids) for part in parts] == sizes
        for part, start in zip(parts, range(0, 5, most)):
            made = collator(examples[start : start + most])
            assert part.ids == made.ids and torch.equal(part.labels, made.labels)
            assert part.inputs.keys() == made.inputs.keys()
            assert all(torch.equal(part.inputs[name], value) for name, value in made.inputs.items())


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_hands_out_each_step_of_the_order_from_any_step_on(collator, dataset, workers):
    split = load_splits(dataset)["train"]
    order = Order(len(split), 4, seed=0)

    def loader(rank: int) -> StepLoader:
        return StepLoader(split, collator, order, Share(1, rank, processes=3), workers=workers)

    state = torch.random.get_rng_state()
    for start in (0, 2):
        steps = zip(*(loader(rank).steps(start, 5) for rank in range(3)))
        ids = [sorted(id for share in step for batch in share for id in batch.ids) for step in steps]
        assert ids == [sorted(split.ids[i] for i in order.step(step)) for step in range(start, 5)]
    assert torch.equal(torch.random.get_rng_state(), state)  # dropout's
    assert list(loader(0).steps(5, 5)) == []
