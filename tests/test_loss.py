"""The mask and the loss, against transformers' own and by changing one token at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import summed_loss_of
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

from im2json.data.collate import IGNORE, Batch
from im2json.data.sources import load_splits
from im2json.families import open_collator
from im2json.model.base import load_base
from im2json.model.lora import add_lora, trained
from im2json.options import ModelOptions

# B examples, S positions, P prefix positions, V vocabulary.
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(small_model) -> PaliGemmaForConditionalGeneration:
    return load_base(small_model, "fp32", "none", CPU)


def logits(model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits  # B x S x V


def one_token_changed(inputs: dict[str, torch.Tensor], position: int) -> dict[str, torch.Tensor]:
    ids = inputs["input_ids"].clone()  # B x S
    ids[:, position] = (ids[:, position] + 1 - 4) % 256 + 4  # another byte
    return inputs | {"input_ids": ids}


def changed(batch: Batch, position: int) -> Batch:
    return replace(batch, inputs=one_token_changed(batch.inputs, position))


def loss_on(model, batch: Batch, labels: torch.Tensor) -> torch.Tensor:
    return summed_loss_of(model, replace(batch, labels=labels))


@pytest.mark.parametrize("training", [False, True])
def test_a_suffix_token_changes_no_logit_before_it(base, collator, batch, training):
    base.train(training)
    before = logits(base, batch.inputs)
    start = len(collator.prefix_ids)
    for position in range(start, start + 12):
        after = logits(base, one_token_changed(batch.inputs, position))
        assert torch.equal(after[:, :position], before[:, :position]), position
        assert not torch.equal(after[:, position:], before[:, position:])
    base.eval()


def test_a_suffix_token_changes_no_loss_before_it(base, batch):
    """The same through the loss: a label is predicted from what comes before it alone."""
    labels = batch.labels
    for position in (labels[0] != IGNORE).nonzero().flatten().tolist()[:12]:
        alone = torch.full_like(labels, IGNORE)  # B x S
        alone[:, position] = labels[:, position]
        expected = loss_on(base, batch, alone)
        assert torch.equal(loss_on(base, changed(batch, position), alone), expected)
        assert not torch.equal(loss_on(base, changed(batch, position - 1), alone), expected)


def test_a_prompt_token_changes_the_image_positions(base, collator, batch):
    image_tokens = collator.processor.image_seq_length
    start = len(collator.prefix_ids)
    with torch.no_grad():
        before = base.model(**batch.inputs).last_hidden_state[:, :image_tokens]  # B x I x D
        for position in range(image_tokens, start):
            after = base.model(**one_token_changed(batch.inputs, position)).last_hidden_state[:, :image_tokens]
            assert (after != before).any(dim=-1).all(), position


def test_without_token_types_the_mask_is_another(base, collator, batch):
    """Why they go along everywhere. Depending on its version, transformers then lets the suffix leak into what comes
    before it, or keeps the prompt from the pictures; never what PaliGemma was trained with."""
    bare = {name: value for name, value in batch.inputs.items() if name != "token_type_ids"}
    image_tokens, start = collator.processor.image_seq_length, len(collator.prefix_ids)

    def moved(position: int, upto: int) -> float:
        """How much a token changes what the model makes of the positions before `upto`."""
        with torch.no_grad():
            before = base.model(**bare).last_hidden_state
            after = base.model(**one_token_changed(bare, position)).last_hidden_state
        return float((after - before)[:, :upto].abs().max())

    suffix_leaks = moved(start + 5, start + 5) > 1e-3
    prompt_reaches_pictures = moved(start - 1, image_tokens) > 1e-3
    assert suffix_leaks or not prompt_reaches_pictures
    assert not torch.allclose(logits(base, bare), logits(base, batch.inputs), atol=1e-3)


def test_padding_changes_nothing(base, collator, dataset):
    split = load_splits(dataset)["train"]
    examples = [split[i] for i in (0, 3, 7)]
    together = collator(examples)
    alone = [collator([example]) for example in examples]
    assert len({batch.labels.shape for batch in alone}) > 1
    total = summed_loss_of(base, together)
    parts = [summed_loss_of(base, one) for one in alone]
    torch.testing.assert_close(total, torch.stack(parts).sum(), rtol=1e-6, atol=0)
    junk = together.inputs["input_ids"].clone()
    junk[together.inputs["attention_mask"] == 0] = 99
    filled = replace(together, inputs=together.inputs | {"input_ids": junk})
    torch.testing.assert_close(summed_loss_of(base, filled), total, rtol=1e-6, atol=0)


def with_lora(base: PaliGemmaForConditionalGeneration):
    """LoRA whose B is not zero, so that A has gradients as well."""
    model = add_lora(base, ModelOptions(model="small", r=4, alpha=8.0), seed=0)
    for parameter in trained(model):
        torch.nn.init.normal_(parameter, std=0.05)
    return model


@pytest.mark.parametrize("prefix_mask", ["full", "picture"])
def test_value_and_gradients_are_those_of_transformers(small_model, dataset, prefix_mask):
    """With `picture` the prompt has type 1, so that it attends as the suffix does."""
    collator = open_collator(small_model, "extract JSON.", prefix_mask=prefix_mask)
    split = load_splits(dataset)["train"]
    batch = collator([split[i] for i in (0, 3, 7)])
    prompt = batch.inputs["token_type_ids"][0, collator.processor.image_seq_length : len(collator.prefix_ids)]
    assert prompt.unique().tolist() == [int(prefix_mask == "picture")]
    model = with_lora(load_base(small_model, "fp32", "none", CPU))
    parameters = trained(model)
    count = int((batch.labels[:, 1:] != IGNORE).sum())
    expected = model(**batch.inputs, labels=batch.labels).loss * count
    expected_grads = torch.autograd.grad(expected, parameters)
    loss = summed_loss_of(model, batch)
    grads = torch.autograd.grad(loss, parameters)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for name_grad, wanted in zip(grads, expected_grads):
        assert wanted.abs().max() > 0
        torch.testing.assert_close(name_grad, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_logits_are_capped_where_the_text_model_says_so(small_model, batch):
    """PaliGemma 2 has Gemma 2 inside, whose logits go through cap * tanh(logits / cap)."""
    config = PaliGemmaConfig.from_pretrained(small_model).to_dict()
    config["text_config"] |= {"model_type": "gemma2", "final_logit_softcapping": 0.05, "attn_logit_softcapping": 50.0,
                              "query_pre_attn_scalar": 32, "sliding_window": 64}  # fmt: skip
    config["text_config"].pop("architectures", None)
    torch.manual_seed(0)
    model = PaliGemmaForConditionalGeneration(PaliGemmaConfig.from_dict(config))
    assert type(model.model.language_model).__name__ == "Gemma2Model"
    hidden = model.model(**batch.inputs, use_cache=False).last_hidden_state[:, :-1]  # B x (S - 1) x D
    raw = model.lm_head(hidden)  # B x (S - 1) x V

    def oracle(scores: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(scores.transpose(1, 2), batch.labels[:, 1:], ignore_index=IGNORE, reduction="sum")

    loss = summed_loss_of(model, batch)
    torch.testing.assert_close(loss, oracle(0.05 * torch.tanh(raw / 0.05)), rtol=1e-5, atol=0)
    assert (loss - oracle(raw)).abs() > 1e-3 * loss
