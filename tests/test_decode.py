"""Our decoding against transformers' greedy generate, and the order in which a split is decoded."""

from __future__ import annotations

import json
import math
import random
import threading
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers import prefix_inputs, reset_accelerate, slow, write_dataset
from PIL import Image
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

import im2json.inference.evaluate as room
from im2json.data.example import FirstExamples
from im2json.data.sources import load_splits
from im2json.families import open_collator
from im2json.inference import plain
from im2json.inference.constrain import Grammar
from im2json.inference.decode import Answer, Decoder, Request
from im2json.inference.evaluate import _windows, evaluate_split
from im2json.inference.settings import DecodeSettings
from im2json.inference.slots import Slots
from im2json.jsontext import canonical
from im2json.model.attention import attention_by_segments, grouped_attention, tiled
from im2json.records import EvaluationKey, Prediction
from im2json.scoring.confidence import leaf_confidence
from im2json.scoring.schema import induce

# B rows, T tokens.
EOS, PAD = 1, 0
NEW = 24  # tokens that are written at most
KINDS = {
    "gemma": {},
    "gemma2": {"model_type": "gemma2", "final_logit_softcapping": 30.0, "attn_logit_softcapping": 5.0,
               "query_pre_attn_scalar": 16, "sliding_window": 4096},
    "gemma2 with a short window": {"model_type": "gemma2", "final_logit_softcapping": 30.0,
                                   "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 16, "sliding_window": 8},
}  # fmt: skip


def make_model(small_model: str, kind: str, heads: int = 4) -> PaliGemmaForConditionalGeneration:
    """Random weights, large enough that different pictures get different and winding texts."""
    config = PaliGemmaConfig.from_pretrained(small_model).to_dict()
    config["text_config"] |= {"num_attention_heads": heads, "head_dim": 16, **KINDS[kind]}
    config["text_config"].pop("architectures", None)
    if "gemma2" in kind:
        config["text_config"].pop("layer_types", None)
    torch.manual_seed(1)
    model = PaliGemmaForConditionalGeneration(PaliGemmaConfig.from_dict(config))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "language_model.layers" in name:
            torch.nn.init.normal_(parameter, std=0.25)
        elif "vision" in name or "projector" in name:
            parameter.data *= 4
    if "gemma2" in kind:
        model.model.language_model.config._attn_implementation = "eager"  # sdpa knows no cap
    return model.eval()


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randn(9, 3, 28, 28, generator=torch.Generator().manual_seed(0)) * 3


def shown(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the model gets of B pictures, B x 3 x H x W."""
    return {"pixel_values": pixels}


def oracle(model: Any, collator: Any, pixels: torch.Tensor, tokens: int = NEW) -> list[list[int]]:
    """What transformers writes for each picture alone, up to EOS."""
    rows = []
    for picture in pixels:
        inputs = prefix_inputs(collator, shown(picture[None]))
        output = model.generate(
            **inputs, max_new_tokens=tokens, do_sample=False, eos_token_id=EOS, pad_token_id=PAD
        )  # 1 x (P + T)
        rows.append(output[0, inputs["input_ids"].shape[1] :].tolist())
    return rows


def end_texts_early(model: Any, collator: Any, pixels: torch.Tensor) -> None:
    """Make a word that some texts hold EOS, by swapping its embedding, which lm_head is tied to, with that of EOS."""
    texts = oracle(model, collator, pixels)
    seen = {word: sum(word in text for text in texts) for word in {word for text in texts for word in text}}
    word = max(sorted(seen), key=lambda word: (0 < seen[word] < len(texts), seen[word]))
    assert 1 < seen[word] < len(texts), texts
    weights = model.lm_head.weight.data
    weights[[EOS, word]] = weights[[word, EOS]]


@pytest.fixture(scope="module", params=KINDS)
def model(request, small_model, collator, pixels) -> PaliGemmaForConditionalGeneration:
    model = make_model(small_model, request.param)
    end_texts_early(model, collator, pixels)
    return model


@pytest.fixture(scope="module")
def expected(model, collator, pixels) -> list[list[int]]:
    rows = oracle(model, collator, pixels)
    assert len({tuple(row) for row in rows}) > len(rows) // 2
    assert len({len(row) for row in rows}) > 1, "texts of different lengths"
    return rows


def as_texts(collator: Any, rows: list[list[int]]) -> list[str]:
    return collator.processor.tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def texts_of(answers: list[Answer]) -> list[str]:
    return [answer.text for answer in answers]


@torch.no_grad()
def forced_logprobs(model: Any, collator: Any, picture: torch.Tensor, tokens: list[int], cap: float | None):
    """Log probability of each token, T, from one forward pass of transformers over the picture and all of them."""
    inputs = prefix_inputs(collator, shown(picture[None]))
    start, ids = inputs["input_ids"].shape[1], torch.tensor([tokens])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["token_type_ids"] = (torch.arange(inputs["input_ids"].shape[1]) >= start).long()[None]
    logits = model(**{name: value.to(model.device) for name, value in inputs.items()}).logits[
        0, start - 1 : -1
    ]  # T x V
    logits = cap * torch.tanh(logits / cap) if cap else logits
    return logits.log_softmax(-1).cpu().gather(1, ids.T)[:, 0]


def make_decoder(
    model: Any, collator: Any, grammar: Grammar | None = None, slots: int = 4, fixed: bool = False
) -> Decoder:
    """`fixed`: as on a GPU, where all slots are computed in every pass, and the host looks one pass late."""
    decoder = Decoder(model, collator, grammar, slots)
    decoder.fixed = fixed
    return decoder


def drafted(decoder: Decoder, pixels: torch.Tensor, limits: Any, sources: list[list[int]]) -> list[Answer]:
    """The answers to pictures that are drafted from these sources."""
    limits = [limits] * len(pixels) if isinstance(limits, int) else limits
    requests = [Request(lambda i=i: shown(pixels[i : i + 1]), limits[i], sources[i]) for i in range(len(pixels))]  # type: ignore[misc]
    answers = dict(decoder.answers(iter(requests), max(limits), max(map(len, sources))))
    return [answers[i] for i in range(len(pixels))]


@pytest.mark.parametrize("fixed", [False, True], ids=["", "fixed rows"])
@pytest.mark.parametrize("slots", [1, 4, 9])
def test_texts_are_those_of_transformers(model, collator, pixels, expected, slots, fixed):
    decoder = make_decoder(model, collator, slots=slots, fixed=fixed)
    answers = decoder(shown(pixels), NEW)
    assert texts_of(answers) == as_texts(collator, expected)
    assert [answer.tokens for answer in answers] == expected
    assert decoder.tokens == sum(map(len, expected))
    assert [answer.tokens for answer in decoder(shown(pixels[3:5]), NEW)] == expected[3:5], "slots are used again"


@pytest.mark.parametrize("fixed", [False, True], ids=["", "fixed rows"])
def test_texts_with_a_causal_prompt_are_those_of_transformers(model, small_model, pixels, expected, fixed):
    """Compare where the prompt has type 1, as vLLM computes PaliGemma."""
    collator = open_collator(small_model, "extract JSON.", prefix_mask="picture")
    wanted = oracle(model, collator, pixels)
    assert wanted != expected
    assert [answer.tokens for answer in make_decoder(model, collator, fixed=fixed)(shown(pixels), NEW)] == wanted


def test_plain_transformers_reads_an_export_with_either_mask(small_model, dataset, tmp_path):
    model, folder = make_model(small_model, "gemma"), str(tmp_path)
    model.generation_config.max_new_tokens = NEW
    model.save_pretrained(folder)
    pictures = [f"{dataset}/test/{i}.png" for i in range(3)]
    images = [Image.open(picture).convert("RGB") for picture in pictures]
    texts = []
    for mask in ("full", "picture"):
        collator = open_collator(small_model, "extract JSON.", prefix_mask=mask)
        collator.processor.save_pretrained(folder)
        texts.append(texts_of(Decoder(model, collator)(collator.pictures(images), NEW)))
        assert plain.answers(folder, collator.text, pictures, 4, collator.both_ways is not None) == texts[-1]
    assert texts[0] != texts[1]


def sources(expected: list[list[int]]) -> dict[str, list[list[int]]]:
    """What may be drafted from, from right to useless."""
    rng = random.Random(5)
    return {
        "the text": expected,
        "half of it": [row[: len(row) // 2] for row in expected],
        "the text with a word changed": [[*row[:5], 7, *row[6:]] for row in expected],
        "the text with a word more and one less": [[*row[:3], 7, *row[3:9], *row[10:]] for row in expected],
        "another's": expected[1:] + expected[:1],
        "reversed": [row[::-1] for row in expected],
        "random": [[rng.randrange(200) for _ in range(NEW)] for _ in expected],
        "of EOS": [[EOS] * NEW for _ in expected],
    }


@pytest.mark.parametrize("fixed", [False, True], ids=["", "fixed rows"])
def test_a_draft_changes_no_answer(model, collator, pixels, expected, fixed):
    passes: dict[str, int] = {}
    plain = Decoder(model, collator)(shown(pixels), NEW)
    for name, source in sources(expected).items():
        decoder = make_decoder(model, collator, slots=9, fixed=fixed)
        answers = drafted(decoder, pixels, NEW, source)
        assert [answer.tokens for answer in answers] == expected, name
        for answer, other in zip(answers, plain):
            torch.testing.assert_close(torch.tensor(answer.logprobs), torch.tensor(other.logprobs), rtol=0, atol=1e-4)
        passes[name] = decoder.passes
    longest = max(map(len, expected))
    assert passes["the text"] <= longest / 3, passes
    assert passes["the text with a word changed"] <= longest / 2, passes
    assert passes["the text with a word more and one less"] <= longest * 2 / 3, passes
    assert passes["random"] >= longest - 2, passes


def test_fixed_rows_grow_fewer_when_no_picture_is_waiting(model, collator, pixels, expected, monkeypatch):
    monkeypatch.setattr("im2json.inference.slots.FEWEST", 1)
    limits = [3 * place + 1 for place in range(9)]
    read: list[int] = []
    pass_of = Slots.advance
    monkeypatch.setattr(Slots, "advance", lambda self, *given: (read.append(self.used), pass_of(self, *given))[1])
    answers = drafted(make_decoder(model, collator, slots=8, fixed=True), pixels, limits, expected[1:] + expected[:1])
    assert [answer.tokens for answer in answers] == [row[:limit] for row, limit in zip(expected, limits)]
    assert read == sorted(read, reverse=True) and set(read) == {8, 4, 2, 1}


@pytest.mark.parametrize("fixed", [False, True], ids=["", "fixed rows"])
def test_no_answer_is_lost_if_memory_runs_out_at_the_end(model, collator, pixels, expected, monkeypatch, fixed):
    monkeypatch.setattr("im2json.inference.slots.FEWEST", 1)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    left, move = [1], Slots.move

    def fail_once(self: Slots, moves: Any) -> None:
        if left:
            left.pop()
            raise torch.cuda.OutOfMemoryError
        move(self, moves)

    monkeypatch.setattr(Slots, "move", fail_once)
    limits = [1] * 5 + [NEW] * 4
    answers = drafted(make_decoder(model, collator, slots=9, fixed=fixed), pixels, limits, [[]] * 9)
    assert not left
    assert [answer.tokens for answer in answers] == [row[:limit] for row, limit in zip(expected, limits)]


@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_a_limit_within_a_draft(model, collator, pixels, expected, tokens):
    answers = drafted(make_decoder(model, collator), pixels, tokens, expected)
    assert [answer.tokens for answer in answers] == [row[:tokens] for row in expected]


@pytest.mark.parametrize("fixed", [False, True], ids=["", "fixed rows"])
def test_log_probabilities_are_those_of_a_forward_pass_over_the_answer(model, collator, pixels, fixed):
    answers = make_decoder(model, collator, fixed=fixed)(shown(pixels), NEW)
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    for picture, answer in zip(pixels, answers):
        wanted = forced_logprobs(model, collator, picture, answer.tokens, cap)
        torch.testing.assert_close(torch.tensor(answer.logprobs), wanted, rtol=1e-4, atol=1e-4)


def test_tokens_begin_where_their_characters_stand(model, collator):
    """The tokenizer's words are bytes, so a character may take several."""
    text = '{"品":"é✓","a":"1"}'
    ids = [4 + byte for byte in text.encode()] + [EOS]
    answer = Decoder(model, collator).answer(ids, [0.0] * len(ids))
    assert answer.text == text
    assert answer.starts == [i for i, char in enumerate(text) for _ in char.encode()] + [len(text)]
    plain = Decoder(model, collator).answer([4 + byte for byte in b"ab"], [0.0] * 2)
    assert (plain.text, plain.starts, plain.logprobs) == ("ab", [0, 1], [0.0, 0.0])


@pytest.mark.parametrize("fixed", [False, True], ids=["", "fixed rows"])
def test_each_row_has_its_limit(model, collator, pixels, expected, fixed):
    limits = [random.Random(3).randint(1, NEW) for _ in expected]
    decoder = make_decoder(model, collator, fixed=fixed)
    cut = [row[:limit] for row, limit in zip(expected, limits)]
    assert texts_of(decoder(shown(pixels), limits)) == as_texts(collator, cut)
    assert decoder.tokens == sum(map(len, cut))


def test_the_model_is_as_before_afterwards(model, collator, pixels, expected):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Decoder(model, collator)(shown(pixels), NEW)
    assert oracle(model, collator, pixels[:2]) == expected[:2]
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_answers_come_as_they_are_finished_and_slots_are_given_on(model, collator, pixels, expected):
    """A picture is not asked for before there is a slot for it."""
    asked: list[int] = []

    def requests() -> Any:
        for i in range(len(pixels)):
            yield Request(lambda i=i: (asked.append(i), shown(pixels[i : i + 1]))[1], NEW)

    seen = []
    for number, answer in make_decoder(model, collator, slots=4).answers(requests(), NEW):
        assert answer.tokens == expected[number]
        seen.append(number)
        assert len(asked) <= len(seen) + 4
    assert sorted(seen) == list(range(len(pixels)))
    assert seen != sorted(seen)


@pytest.mark.parametrize("held", [False, True], ids=["", "held to a grammar"])
@pytest.mark.parametrize("fixed", [False, True], ids=["", "fixed rows"])
def test_requests_that_come_later_join_those_being_written(model, collator, pixels, grammar, monkeypatch, fixed, held):
    """Ask an iterator that has ended again, as long as an answer is being written."""
    monkeypatch.setattr("im2json.inference.slots.FEWEST", 1)
    grammar = grammar if held else None
    expected = [answer.tokens for answer in make_decoder(model, collator, grammar)(shown(pixels), NEW)]
    decoder = make_decoder(model, collator, grammar, slots=4, fixed=fixed)
    arrivals = {0: [0], 2: [1, 2, 3, 4, 5], 3: [6], NEW: [7, 8]}  # by the pass after which they come
    waiting: list[int] = []
    begun: list[int] = []
    rows: list[int] = []

    class Queue:
        def __iter__(self) -> Queue:
            return self

        def __next__(self) -> Request:
            for after in [after for after in arrivals if after <= decoder.passes]:
                waiting.extend(arrivals.pop(after))
            if not waiting:
                raise StopIteration
            i = waiting.pop(0)
            begun.append(i)
            return Request(lambda: shown(pixels[i : i + 1]), NEW)

    advance = Slots.advance
    monkeypatch.setattr(Slots, "advance", lambda self, *given: (rows.append(self.used), advance(self, *given))[1])
    found = {begun[number]: answer.tokens for number, answer in decoder.answers(Queue(), NEW)}
    assert sorted(found) == list(range(9))
    assert [found[i] for i in range(9)] == expected
    assert any(one < other for one, other in pairwise(rows)), rows


def test_a_call_within_another_and_one_that_was_left(model, collator, pixels, expected):
    decoder = make_decoder(model, collator, slots=4)
    requests = [Request(lambda one=one: shown(one[None]), NEW) for one in pixels]
    found = {}
    for number, answer in decoder.answers(requests, NEW):
        found[number] = answer.tokens
        assert decoder(shown(pixels[:1]), 3)[0].tokens == expected[0][:3]
    assert [found[i] for i in range(len(pixels))] == expected
    next(decoder.answers(requests, NEW))
    assert [answer.tokens for answer in decoder(shown(pixels), NEW)] == expected


def test_what_one_row_drafted_does_not_outlive_it(small_model, collator, pixels, monkeypatch):
    """Eight short texts that were drafted right must not make a pass for the ninth, whose draft is wrong, long."""
    model = make_model(small_model, "gemma")
    long = 3 * NEW
    texts = [answer.tokens for answer in Decoder(model, collator)(shown(pixels), long)]
    lengths: list[int] = []
    advance = Slots.advance

    def noting(slots: Slots, length: int, *given: Any) -> None:
        lengths.append(length)
        advance(slots, length, *given)

    monkeypatch.setattr(Slots, "advance", noting)
    wrong = [random.Random(1).randrange(3, 250) for _ in range(long)]
    answers = drafted(make_decoder(model, collator, slots=9), pixels, [NEW] * 8 + [long], [*texts[:8], wrong])
    assert [answer.tokens for answer in answers] == [text[:NEW] for text in texts[:8]] + [texts[8]]
    assert max(lengths) >= 16 and max(lengths[-long // 3 :]) <= 2, lengths


def test_a_slot_that_overflowed_is_clean_for_the_next_text(small_model, collator, pixels):
    model = make_model(small_model, "gemma")
    expected = oracle(model, collator, pixels[:1])
    decoder = make_decoder(model, collator, slots=1)
    spoiled = torch.full_like(pixels[:1], float("nan"))
    answers = decoder(shown(torch.cat([spoiled, pixels[:1]])), NEW)
    assert len(answers[0].tokens) == NEW or EOS in answers[0].tokens
    assert answers[1].tokens == expected[0]


# --- held to a grammar

SCHEMA = induce([{"nm": "a", "n": [1, None]}, {"nm": "b", "sub": {"x": True}, "n": []}])


@pytest.fixture(scope="module")
def grammar(model, collator) -> Grammar:
    return Grammar(SCHEMA, collator.processor.tokenizer, model.lm_head.out_features, "schema")


@torch.no_grad()
def constrained_oracle(model: Any, collator: Any, grammar: Grammar, picture: torch.Tensor) -> tuple[list[int], Any]:
    """Token by token, nothing kept from one to the next; and the log probabilities without a grammar."""
    matcher, tokens, logprobs = grammar.matcher(), [], []
    cap = model.config.get_text_config().final_logit_softcapping if "gemma2" in str(model.config) else None
    while len(tokens) < NEW and EOS not in tokens:
        inputs = prefix_inputs(collator, shown(picture[None]))
        start = inputs["input_ids"].shape[1]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([tokens], dtype=torch.long)], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["token_type_ids"] = (torch.arange(start + len(tokens)) >= start).long()[None]
        logits = model(**inputs).logits[0, -1]
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        allowed = torch.from_numpy(bits[: len(logits)].copy()).bool()
        tokens.append(int(logits.masked_fill(~allowed, float("-inf")).argmax()))
        capped = logits if cap is None else cap * torch.tanh(logits / cap)
        logprobs.append(capped.log_softmax(-1)[tokens[-1]])
        if tokens[-1] != EOS:
            matcher.consume_token(tokens[-1])
    return tokens, torch.stack(logprobs)


@pytest.mark.parametrize("source", ["its text", *slow("none", "another's")])
@pytest.mark.parametrize("fixed", [False, True], ids=["", "fixed rows"])
def test_a_grammar_is_followed(model, collator, pixels, grammar, source, fixed):
    decoder, plain = make_decoder(model, collator, grammar, fixed=fixed), Decoder(model, collator, grammar)
    texts = [answer.tokens for answer in plain(shown(pixels[:4]), NEW)]
    given = {"none": [[]] * 4, "its text": texts, "another's": texts[1:] + texts[:1]}[source]
    answers = drafted(decoder, pixels[:4], NEW, given)
    for picture, answer in zip(pixels, answers):
        tokens, logprobs = constrained_oracle(model, collator, grammar, picture)
        added = len(answer.tokens) - len(tokens)
        assert answer.tokens[: len(tokens)] == tokens
        assert answer.cut == (added > 0) == (EOS not in tokens)
        logprobs = torch.cat([logprobs, torch.full((added,), -math.inf)])
        torch.testing.assert_close(torch.tensor(answer.logprobs), logprobs, rtol=1e-3, atol=1e-3)


def test_answers_are_valid_whatever_the_picture_and_the_limit(model, collator, pixels, grammar):
    pictures = torch.cat([pixels, torch.ones(2, 3, 28, 28), -torch.ones(2, 3, 28, 28), pixels[:3] * 100])
    limits = [random.Random(4).randint(1, 60) for _ in pictures]
    answers = Decoder(model, collator, grammar)(shown(pictures), limits)
    for answer, limit in zip(answers, limits):
        jsonschema.validate(json.loads(answer.text), SCHEMA)
        added = answer.logprobs.count(-math.inf)
        assert answer.logprobs[len(answer.tokens) - added :] == [-math.inf] * added
        assert answer.cut == (added > 0)
        if answer.cut:
            assert len(answer.tokens) - added == limit
            assert EOS not in answer.tokens
        assert leaf_confidence(answer.text, answer.starts, answer.logprobs) is not None


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_grouped_attention_is_attention_with_repeated_keys(softcap):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 5, 6, 8, generator=generator)
    keys, values = torch.randn(2, 3, 7, 2, 8, generator=generator)
    mask = torch.randn(3, 5, 7, generator=generator)
    scores = query.transpose(1, 2) @ keys.repeat_interleave(3, 2).permute(0, 2, 3, 1) * 0.3
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    weights = (scores + mask[:, None]).softmax(-1)
    wanted = (weights @ values.repeat_interleave(3, 2).transpose(1, 2)).transpose(1, 2)
    found = grouped_attention(query, keys, values, tiled(mask, 3), 0.3, softcap)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("lengths", [[4, 4, 4], [1, 5, 2, 5]])
def test_attention_by_segments_is_that_of_each_segment_alone(lengths):
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(3, sum(lengths), 2, 8, generator=generator).requires_grad_()
    alone = [
        torch.einsum("shl,lhe->she", (torch.einsum("she,lhe->shl", query, keys) * 0.3).softmax(-1), values)
        for query, keys, values in (segment.unbind() for segment in parts.split(lengths, 1))
    ]
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    found = attention_by_segments(*parts, bounds, max(lengths), 0.3)
    torch.testing.assert_close(found, torch.cat(alone))
    weights = torch.randn(found.shape, generator=generator)
    wanted, got = (torch.autograd.grad((each * weights).sum(), parts)[0] for each in (torch.cat(alone), found))
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("fixed", [False, True], ids=["", "fixed rows"])
def test_memory_that_does_not_suffice_halves_the_slots(small_model, collator, pixels, capsys, monkeypatch, fixed):
    """Nothing that is written is lost, and no answer comes twice."""
    model = make_model(small_model, "gemma")
    limits = [3, 5, 7, 2, 9, 4, 6, 8, 1]
    whole = Decoder(model, collator)(shown(pixels), limits)
    advance, room = Slots.advance, 4

    def short(slots: Slots, *given: Any) -> None:
        if slots.used > room:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        advance(slots, *given)

    monkeypatch.setattr(Slots, "advance", short)
    decoder = make_decoder(model, collator, slots=9, fixed=fixed)
    assert texts_of(decoder(shown(pixels), limits)) == texts_of(whole)
    lines = capsys.readouterr()
    assert "out of GPU memory with 9 answers at once: going on with 4" in lines.out + lines.err
    assert decoder.slots == 4
    room = 0
    with pytest.raises(torch.cuda.OutOfMemoryError):
        decoder(shown(pixels), 4)


# --- a split


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A split of 23 examples."""
    return load_splits(str(write_dataset(tmp_path_factory.mktemp("data") / "many", test=23)))["test"]


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    reset_accelerate()
    return Accelerator(cpu=True)


KEY = EvaluationKey(1, "test", "after")


def predicted(model: Any, collator: Any, split: Any, accelerator: Accelerator, **more: Any) -> tuple[Any, Any]:
    """What an evaluation hands out and returns."""
    predictions: list[Prediction] = []

    def on_predictions(first: int, some: list[Prediction]) -> None:
        assert first == len(predictions)
        predictions.extend(some)

    settings = DecodeSettings(**{"max_new_tokens": 12, **more})
    metrics = evaluate_split(
        KEY,
        lambda: Decoder(model, collator, slots=settings.batch_size),
        collator,
        split,
        accelerator,
        settings,
        on_predictions,
    )
    return predictions, metrics


@pytest.mark.parametrize(("size", "window"), [(4, 8), (64, 1024), *slow((1, 16), (4, 64), (3, 3))])
def test_no_row_depends_on_batches_or_windows(small_model, collator, many, accelerator, monkeypatch, size, window):
    model = make_model(small_model, "gemma")
    monkeypatch.setattr(room, "WINDOW", window)
    rows, metrics = predicted(model, collator, many, accelerator, batch_size=size)
    assert [row.id for row in rows] == list(many.ids)
    alone = [collator.pictures([many[i].image]) for i in range(len(many))]
    assert [row.text for row in rows] == [Decoder(model, collator)(one, 12)[0].text for one in alone]
    assert len({row.text for row in rows}) > 3
    monkeypatch.undo()
    assert metrics == pytest.approx(predicted(model, collator, many, accelerator, batch_size=5)[1])


def test_each_example_has_its_limit(small_model, collator, many, accelerator):
    model = make_model(small_model, "gemma")
    limits = [1 + i % 9 for i in range(len(many))]
    rows, _ = predicted(model, collator, many, accelerator, batch_size=4, max_new_tokens=limits)
    whole, _ = predicted(model, collator, many, accelerator, batch_size=4, max_new_tokens=9)
    alone = [collator.pictures([many[i].image]) for i in range(len(many))]
    decoder = Decoder(model, collator)
    assert [row.text for row in rows] == [decoder(one, n)[0].text for one, n in zip(alone, limits)]
    assert all(full.text.startswith(row.text.rstrip("�")) for full, row in zip(whole, rows))


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("total", [0, 1, 7, 23])
def test_processes_share_every_window_out(many, total, processes, monkeypatch):
    monkeypatch.setattr(room, "WINDOW", 4)
    targets = many.targets[:total]
    shares = [list(_windows(targets, rank, processes)) for rank in range(processes)]
    assert len({len(share) for share in shares}) == 1
    windows = list(zip(*shares))
    assert [i for window in windows for i in sorted(chain.from_iterable(window))] == list(range(total))

    def length(i: int) -> int:
        return len(canonical(targets[i]))

    for window in windows:
        assert all(list(map(length, part)) == sorted(map(length, part), reverse=True) for part in window)
        for place in range(1, max(map(len, window))):  # a process's n-th longest is no longer than another's one before
            before, now = ([length(part[i]) for part in window if i < len(part)] for i in (place - 1, place))
            assert max(now) <= min(before)


class Watched:
    """A split that says which examples were asked for."""

    def __init__(self, split: Any) -> None:
        self.split, self.targets = split, split.targets
        self.asked: list[int] = []
        self.change = threading.Condition()

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> Any:
        with self.change:
            self.asked.append(index)
            self.change.notify_all()
        return self.split[index]

    def wait(self, count: int) -> bool:
        """Whether so many are asked for soon."""
        with self.change:
            return self.change.wait_for(lambda: len(self.asked) >= count, timeout=300)


def test_pictures_are_loaded_while_the_decoder_is_made(small_model, collator, many, accelerator):
    split = Watched(many)

    def waiting() -> Decoder:
        assert split.wait(1)
        return Decoder(make_model(small_model, "gemma"), collator)

    settings = DecodeSettings(max_new_tokens=2, batch_size=8)
    assert evaluate_split(KEY, waiting, collator, split, accelerator, settings)["num"] == 23


def test_nothing_to_write(small_model, collator, many, accelerator):
    model = make_model(small_model, "gemma")
    rows, metrics = predicted(model, collator, FirstExamples(many, 0), accelerator, batch_size=4)
    assert rows == [] and metrics["num"] == 0


def test_a_process_without_examples(small_model, collator, many, accelerator, monkeypatch):
    """The second of two, of a split of one example."""
    monkeypatch.setattr(room, "_windows", lambda targets, *_: _windows(targets, 1, 2))
    model = make_model(small_model, "gemma")
    rows, metrics = predicted(model, collator, FirstExamples(many, 1), accelerator, batch_size=4)
    assert rows == [] and metrics["num"] == 0


def test_a_picture_that_cannot_be_read_stops_the_evaluation(small_model, collator, tmp_path, accelerator):
    folder = write_dataset(tmp_path / "broken", test=9)
    Path(folder / "test" / "7.png").write_bytes(b"no picture")
    split = load_splits(str(folder))["test"]
    with pytest.raises(ValueError, match=r"7\.png"):
        predicted(make_model(small_model, "gemma"), collator, split, accelerator, batch_size=2)
