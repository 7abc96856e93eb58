"""What only a GPU can show: bf16 and fp16 training, paging, and full runs through train.py there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from helpers import prefix_inputs
from small_model import save_small_chat, save_small_paligemma

if TYPE_CHECKING:
    from im2json.training.strategy import Strategy
    from im2json.workspace import Workspace

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


def run(tmp_path: Path, name: str, *flags: str) -> dict:
    """Train the small model on a few receipts; what result.json holds."""
    from train import main

    model = tmp_path / "model"
    if not model.exists():
        save_small_paligemma(model)
    main(
        ["--model", str(model), "--steps", "6", "--batch-size", "4", "--eval-every", "3", "--eval-examples", "4",
         "--max-new-tokens", "16", "--no-test", "--output", str(tmp_path / name), *flags],
        standalone_mode=False,
    )  # fmt: skip
    return json.loads((tmp_path / name / "result.json").read_text())


def losses(run_folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return [row["values"]["loss"] for row in rows if row["split"] == "train"]


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_a_run_in_every_precision(tmp_path: Path, precision: str) -> None:
    result = run(tmp_path, "run", "--precision", precision, "--lr", "1e-2")
    values = losses(tmp_path / "run")
    assert result["step"] == 6
    assert values[-1] < values[0]
    assert result["peak_memory_bytes"] > 0


def test_auto_precision_is_bf16_where_the_gpu_has_it(tmp_path: Path) -> None:
    run(tmp_path, "auto")
    run(tmp_path, "bf16", "--precision", "bf16")
    assert losses(tmp_path / "auto") == losses(tmp_path / "bf16")


def test_fp16_overflow_halves_the_scale_and_leaves_the_update_out(tmp_path: Path) -> None:
    from im2json.model.lora import trained
    from im2json.model.replay import Forward
    from im2json.training.optimizer import make_optimizer
    from im2json.training.update import Update

    space = open_small(tmp_path, precision="fp16", batch_size=2, microbatch=2)
    accelerator, parameters = space.accelerator, trained(space.model)
    optimizer = accelerator.prepare(make_optimizer(parameters, space.config.train))
    update = Update(
        Forward(space.model, space.family.hidden_states), parameters, optimizer, accelerator, 1.0, microbatch=2
    )
    (batches,) = space.step_loader(chosen(space)).steps(0, 1)
    tokens = sum(int((batch.labels != -100).sum()) for batch in batches)
    before = [parameter.detach().clone() for parameter in parameters]
    assert accelerator.scaler is not None
    accelerator.scaler.scale(torch.ones((), device="cuda"))  # it has no scale until it is first used
    accelerator.scaler.update(2.0**100)

    outcome = update(batches, tokens)

    assert outcome.skipped
    assert not outcome.non_finite
    assert accelerator.scaler.get_scale() == 2.0**99
    assert all(torch.equal(a, b) for a, b in zip(before, parameters))

    accelerator.scaler.update(2.0**10)
    outcome = update(batches, tokens)
    assert not outcome.skipped
    assert any(not torch.equal(a, b) for a, b in zip(before, parameters))


def test_ten_overflows_running_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from click import ClickException

    def stubborn(*args, **kwargs) -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cuda", init_scale=2.0**110, backoff_factor=0.99)

    monkeypatch.setattr("accelerate.accelerator.get_grad_scaler", stubborn)
    with pytest.raises(ClickException, match="10 updates in a row overflowed"):
        run(tmp_path, "run", "--precision", "fp16", "--steps", "30", "--eval-every", "0")
    assert len(losses(tmp_path / "run")) == 9


def test_resuming_on_a_gpu_continues_the_same_run(tmp_path: Path) -> None:
    from train import main

    paged = ["--r", "2048", "--lr", "1e-4"]  # moments of at least 100,000 elements are paged
    run(tmp_path, "whole", *paged)
    run(tmp_path, "other", *paged)
    other = tmp_path / "other"
    (other / "result.json").unlink()
    import shutil

    shutil.rmtree(other / "checkpoints" / "step-6")
    main(["--resume", str(other)], standalone_mode=False)
    assert losses(other) == pytest.approx(losses(tmp_path / "whole"), rel=1e-3)


def open_small(tmp_path: Path, **options: object) -> Workspace:
    from im2json.options import TrainConfig
    from im2json.workspace import open_workspace, start_accelerator

    save_small_paligemma(tmp_path / "model")
    config = TrainConfig.resolve({"model": str(tmp_path / "model"), "batch_size": 16, "workers": 0, **options})
    return open_workspace(config, *start_accelerator(config))


def chosen(space: Workspace) -> Strategy:
    from im2json.training.strategy import choose_strategy

    return choose_strategy(space.workload())


def test_microbatch_auto_takes_the_whole_step_where_it_has_room(tmp_path: Path) -> None:
    space = open_small(tmp_path, launch="single")
    assert space.config.train.microbatch == "auto"
    assert chosen(space).microbatch == 16


def test_recorded_passes_are_no_larger_than_keeps_a_gpu_busy(tmp_path: Path) -> None:
    from im2json.training.strategy import ENOUGH, Strategy

    space = open_small(tmp_path)
    positions = space.collator.longest_prefix + space.lengths.longest
    assert chosen(space) == Strategy("graphs", False, 6)
    assert 5 * positions < ENOUGH < 7 * positions


def test_microbatch_auto_takes_what_has_room(tmp_path: Path) -> None:
    """The forecast against the room that the process is held to, as if the GPU were so small."""
    from im2json.model.memory import MARGIN, free_bytes
    from im2json.training.strategy import Strategy, choose_strategy, strategy_note

    space = open_small(tmp_path, launch="single")
    parts = space.workload().forecast(Strategy("single", False, 8))
    room = torch.cuda.memory_allocated() + (parts.lora + parts.step) * 1.01 / MARGIN
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)
    try:
        assert free_bytes() == pytest.approx(room - torch.cuda.memory_allocated(), rel=1e-3)
        work = space.workload()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert choose_strategy(work) == Strategy("single", False, 8)
    assert "a step's 16 examples 8 at a time" in (strategy_note(choose_strategy(work), work) or "")


def test_out_of_memory_halves_the_microbatch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A step that fits, and the same one with less room for activations than it took."""
    from im2json.model.lora import trained
    from im2json.model.replay import Forward
    from im2json.training.update import Update, seed_dropout

    space = open_small(tmp_path, launch="single", microbatch=16)
    parameters, losses = trained(space.model), []
    optimizer = space.accelerator.prepare(torch.optim.SGD(parameters, lr=0.0))
    update = Update(
        Forward(space.model, space.family.hidden_states), parameters, optimizer, space.accelerator, 1.0, microbatch=16
    )
    (batches,) = space.step_loader(chosen(space)).steps(0, 1)
    tokens = sum(int((batch.labels != -100).sum()) for batch in batches)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    try:
        for _ in range(2):
            seed_dropout(0, 0, 0)
            losses.append(update(batches, tokens).loss)
            room = before + 0.6 * (torch.cuda.max_memory_allocated() - before)
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert update.microbatch < 16
    assert losses[1] == pytest.approx(losses[0], rel=0.02)  # other masks of dropout
    assert "out of memory with 16 examples at a time" in capsys.readouterr().out


@pytest.mark.parametrize("options", [{"dequantize": "on"}, {"dequantize": "off"}, {"dropout": 0.1}], ids=str)
def test_replayed_gradients_are_those_of_single_launches(tmp_path: Path, options: dict) -> None:
    """Six steps of microbatches of many lengths, some seen once, most replayed, evaluations of weights in between."""
    from im2json.model.lora import trained
    from im2json.model.replay import Forward, Replayed
    from im2json.training.optimizer import flatten
    from im2json.training.update import Update, seed_dropout

    space = open_small(tmp_path, **{"microbatch": 4, "precision": "fp32", "dropout": 0.0, **options})
    (flat,) = parameters = [flatten(trained(space.model))]
    with torch.no_grad():
        flat.normal_(std=0.05)
    replayed, loader = Replayed(space.model, space.family.hidden_states), space.step_loader(chosen(space))

    def gradient(forward: Forward, step: int) -> tuple[float, torch.Tensor]:
        assert flat.grad is not None
        flat.grad.zero_()
        seed_dropout(0, step, 0)
        (batches,) = loader.steps(step, step + 1)
        update = Update(forward, parameters, None, space.accelerator, 1.0, microbatch=4)
        return float(update.add_gradients(batches, 100)), flat.grad.clone()

    for step in [0, 1, 2, 0, 1, 2]:
        loss, found = gradient(replayed, step)
        if "dropout" not in options:
            expected_loss, expected = gradient(Forward(space.model, space.family.hidden_states), step)
            assert loss == pytest.approx(expected_loss, rel=1e-4)
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert any(replayed.recorded.values())
    if "dropout" in options:  # masks are a function of the step, and differ between steps
        (loss, first), (_, again) = gradient(replayed, 0), gradient(replayed, 0)
        assert torch.equal(first, again)
        replayed.forget()
        assert gradient(replayed, 0)[0] == pytest.approx(loss, rel=0.05)


def test_a_plan_measures_beside_its_forecast(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, "run", "--steps", "1", "--eval-every", "0")  # saves the model
    from train import main

    main(["--model", str(tmp_path / "model"), "--plan", "--output", str(tmp_path / "plan")], standalone_mode=False)
    assert "GiB at most in 9 steps" in capsys.readouterr().out
    assert not (tmp_path / "plan").exists()


def test_training_memory_does_not_grow_with_evaluations(tmp_path: Path) -> None:
    rare = run(tmp_path, "rare", "--eval-every", "6", "--launch", "single")
    torch.cuda.reset_peak_memory_stats()
    often = run(tmp_path, "often", "--eval-every", "1", "--launch", "single")
    assert often["peak_memory_bytes"] <= rare["peak_memory_bytes"] * 1.05


# --- decoding


def decoding_model(tmp_path: Path, kind: str, dtype: str):
    """A random model on the GPU whose texts differ, and its collator."""
    from im2json.families import open_collator
    from tests.test_decode import make_model

    folder = str(save_small_paligemma(tmp_path / "model"))
    model = make_model(folder, kind, heads=8).to("cuda", getattr(torch, dtype))
    return model, open_collator(folder, "extract JSON.")


def pictures(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 28, 28, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize("kind", ["gemma", "gemma2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_replayed_graph_writes_what_single_steps_write(
    tmp_path: Path, kind: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drafted from the right text, half of the rows; graphs of several lengths, slots that are given on."""
    from im2json.inference.decode import Decoder, Request
    from im2json.inference.slots import Slots

    model, collator = decoding_model(tmp_path, kind, dtype)
    limits = [3 + i * 5 % 38 for i in range(40)]
    shown = pictures(40)
    plain = Decoder(model, collator, slots=16)({"pixel_values": shown}, limits)

    def texts() -> list[str]:
        decoder = Decoder(model, collator, slots=16)
        requests = [
            Request(lambda i=i: {"pixel_values": shown[i : i + 1]}, limits[i], plain[i].tokens if i % 2 else ())  # type: ignore[misc]
            for i in range(40)
        ]
        found = dict(decoder.answers(requests, 48, 48))
        assert decoder.tokens <= sum(limits)
        return [found[i].text for i in range(40)]

    replayed = texts()
    assert len(set(replayed)) > 7
    assert texts() == replayed
    monkeypatch.setattr(Slots, "_run", lambda _, name, length, work: work(length))
    stepped = texts()
    for others in (stepped, [answer.text for answer in plain]):
        equal = sum(one == other for one, other in zip(others, replayed))
        assert equal == 40 if dtype == "float32" else equal >= 32  # a tie may fall the other way


@pytest.mark.parametrize("kind", ["gemma", "gemma2"])
def test_a_grammar_is_followed_by_a_replayed_graph(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of which some end before others, drafted from what they are."""
    jsonschema = pytest.importorskip("jsonschema")
    from im2json.inference.constrain import Grammar
    from im2json.inference.decode import Decoder, Request
    from im2json.inference.slots import Slots
    from im2json.scoring.schema import induce

    model, collator = decoding_model(tmp_path, kind, "float32")
    schema = induce([{"total": "1", "menu": [{"nm": "a"}]}, {"total": "2", "n": 1}])
    grammar = Grammar(schema, collator.processor.tokenizer, model.lm_head.out_features, "schema")
    limits, shown = [9 + i * 5 % 38 for i in range(14)], pictures(14)

    def answers(sources: list[list[int]]) -> list[list[int]]:
        decoder = Decoder(model, collator, grammar, slots=6)
        requests = [Request(lambda i=i: {"pixel_values": shown[i : i + 1]}, limits[i], sources[i]) for i in range(14)]  # type: ignore[misc]
        found = dict(decoder.answers(requests, 48, 48))
        for answer in found.values():
            jsonschema.validate(json.loads(answer.text), schema)
        return [found[i].tokens for i in range(14)]

    replayed = answers([[]] * 14)
    assert answers(replayed) == replayed
    monkeypatch.setattr(Slots, "_run", lambda _, name, length, work: work(length))
    assert answers(replayed) == replayed


@pytest.mark.parametrize("kind", ["gemma", "gemma2"])
def test_a_gpu_writes_what_transformers_writes(tmp_path: Path, kind: str) -> None:
    from im2json.inference.decode import Decoder
    from tests.test_decode import EOS, PAD, as_texts, forced_logprobs

    model, collator = decoding_model(tmp_path, kind, "float32")
    inputs = {name: value.to("cuda") for name, value in prefix_inputs(collator, {"pixel_values": pictures(6)}).items()}
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False, eos_token_id=EOS, pad_token_id=PAD)
    expected = as_texts(collator, output[:, inputs["input_ids"].shape[1] :].tolist())
    answers = Decoder(model, collator, slots=4)({"pixel_values": pictures(6)}, 40)
    found = [answer.text for answer in answers]
    for picture, answer in zip(pictures(6), answers):
        if collator.processor.image_token_id in answer.tokens:
            continue  # transformers would look for a picture there
        wanted = forced_logprobs(model, collator, picture, answer.tokens, 30.0 if kind == "gemma2" else None)
        torch.testing.assert_close(torch.tensor(answer.logprobs), wanted, rtol=1e-3, atol=1e-3)
    assert sum(one == other for one, other in zip(found, expected)) >= 5  # a tie may fall the other way


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gpu_writes_with_a_chat_model_what_transformers_writes(tmp_path: Path, dtype: str) -> None:
    """Pictures of different sizes, from right drafts and from none."""
    from im2json.families import open_collator
    from im2json.inference.decode import Decoder, Request
    from tests.test_families import IMAGES, NEW, generated, talkative

    model = talkative(save_small_chat(tmp_path / "chat")).to("cuda")
    collator = open_collator(str(tmp_path / "chat"), "extract JSON.")
    expected = [generated(model, collator, image) for image in IMAGES]
    model, decoders = model.to(getattr(torch, dtype)), [Decoder(model, collator, slots=3) for _ in range(2)]
    for decoder, sources in zip(decoders, ([()] * len(IMAGES), expected)):
        requests = [Request(lambda i=i: collator.pictures([IMAGES[i]]), NEW, sources[i]) for i in range(len(IMAGES))]  # type: ignore[misc]
        found = dict(decoder.answers(requests, NEW, NEW))
        equal = sum(found[i].tokens == tokens for i, tokens in enumerate(expected))
        assert equal >= (3 if dtype == "float32" else 1)  # a tie may fall the other way


def test_a_chat_model_is_trained_on_a_gpu(tmp_path: Path) -> None:
    save_small_chat(tmp_path / "model")
    result = run(tmp_path, "run", "--lr", "1e-2", "--image-tokens", "64")
    values = losses(tmp_path / "run")
    assert result["step"] == 6
    assert values[-1] < values[0]


def test_longer_answers_get_slots_of_their_own_and_memory_is_given_back(tmp_path: Path) -> None:
    from im2json.inference.decode import Decoder

    model, collator = decoding_model(tmp_path, "gemma", "float32")
    Decoder(model, collator)({"pixel_values": pictures(1)}, 2)  # cuBLAS keeps a workspace for each stream
    before = torch.cuda.memory_allocated()
    decoder = Decoder(model, collator, slots=16)
    small = decoder({"pixel_values": pictures(2)}, 10)
    recorded = decoder.seconds_recording
    assert [answer.text for answer in decoder({"pixel_values": pictures(2)}, 10)] == [answer.text for answer in small]
    assert decoder.seconds_recording == recorded > 0
    large = decoder({"pixel_values": pictures(9)}, [10] * 2 + [200] * 7)
    assert [answer.text for answer in large[:2]] == [answer.text for answer in small]
    assert decoder._idle.room.tokens == 200
    del decoder
    assert torch.cuda.memory_allocated() <= before + 2**20
