"""A trained run as files that others load: merged weights for transformers and vLLM, or the adapter alone."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from transformers import GenerationConfig

from im2json.data.check import examine
from im2json.data.collate import Collator
from im2json.data.example import RunSplit
from im2json.data.sources import open_splits
from im2json.data.splits import divide, restore
from im2json.errors import UserError
from im2json.families import family_of
from im2json.files import fresh_folder, write_json
from im2json.inference.extract import Extractor
from im2json.model.base import load_base
from im2json.model.loading import choose_device
from im2json.options import TrainConfig
from im2json.records import Prediction, SplitRecord
from im2json.report.modelcard import model_card
from im2json.resume import WARM_START_OPTIONS, reading_config
from im2json.runs import ADAPTER_COMPANIONS, USAGE, RunFolder, adapter_folder, check_folder
from im2json.scoring import StreamingEvaluator
from im2json.scoring.evaluator import Difference, compare
from im2json.scoring.examples import kept_predictions, score_predictions
from im2json.text import command_line

SAFETENSORS_NAMES = {torch.bfloat16: "BF16", torch.float32: "F32"}
"""Types that merged weights may have, with their names in the files."""
EXAMPLES = 32
"""Validation examples whose answers are compared, at most."""
BATCH = 8
"""Pictures that the exported model reads at a time."""
LEAST = 0.9
"""Share of the answers that have to stay the same: rounding to bf16 decides ties between tokens anew."""


@dataclass(frozen=True)
class Parity:
    """How the answers of an exported model compare with the run's own."""

    same: int  # texts of plain transformers that are the run's
    examples: int
    field_f1: dict[str, Difference]  # of the run and of each form of the exported model, by form
    lost: int = 0  # validation examples with answers of the run that are no longer what they were

    @property
    def share(self) -> float:
        return self.same / self.examples

    def __str__(self) -> str:
        same = f"{self.same} of {self.examples} answers are the run's to the letter"
        lost = f" ({self.lost} left out, because their examples changed since the run began)" if self.lost else ""
        forms = [
            f"{form} {found.second:.3f} ({found.difference:+.3f}, {interval_text(found)})"
            for form, found in self.field_f1.items()
        ]
        run = next(iter(self.field_f1.values())).first
        return f"{same}{lost}; field F1: the run {run:.3f}, {', '.join(forms)}"


def interval_text(found: Difference) -> str:
    """Return the 95 % interval of a difference in words."""
    return "too few for an interval" if math.isnan(found.low) else f"{found.low:+.3f} to {found.high:+.3f}"


def export_run(
    run: RunFolder,
    out: Path,
    adapter_alone: bool,
    least: float,
    title: str,
    dtype: torch.dtype,
    nf4: bool,
) -> Parity | None:
    """Write a finished run's model to a folder with a model card; merged weights only if they answer as the run did.

    Args:
        adapter_alone: copy the adapter; there is nothing that could differ, and None is returned.
        least: share of the validation examples whose text has to be the run's.
        title: the model's name in its model card.
        dtype: of the merged weights.
        nf4: store the merged weights of linear layers in 4 bits.

    Raises:
        UserError: if the run is not finished or has no answers to compare with, the folder is there already, or the
            check fails; nothing is left of the folder then.
    """
    run.read_config()  # is it a run at all
    check_folder(out, "--out")
    asked = None if adapter_alone else Asked.of(run)
    scorecard = score_predictions(kept_predictions(run, "test"))
    found = None
    with fresh_folder(out) as aside:
        if asked is None:
            shutil.copytree(adapter_folder(run.path), aside, dirs_exist_ok=True)
            for name in ADAPTER_COMPANIONS:
                if (run.path / name).exists():
                    shutil.copy(run.path / name, aside)
        else:
            extractor = write_merged(run, aside, dtype, nf4)
            texts, collator = [row["text"] for row in extractor(asked.images)], extractor.decoder.collator
            del extractor
            torch.cuda.empty_cache()  # the model is gone; another process is about to load its own
            found = parity(asked, {
                "merged weights": texts, "plain generate": _plain_answers(aside, collator, asked.images)
            })  # fmt: skip
            if found.share < least:
                raise UserError(f"not exported: {found}, which is less than --parity {least:g} of them")
        (aside / "README.md").write_text(model_card(run, scorecard, title, adapter_alone, str(found or "")), "utf-8")
    return found


@dataclass(frozen=True)
class Asked:
    """Validation examples that the run answered and the exported model is asked about."""

    answers: list[Prediction]
    images: list[Image.Image]
    lost: int  # examples that are no longer what they were when the run began

    @classmethod
    def of(cls, run: RunFolder) -> Asked:
        """Load up to EXAMPLES examples.

        Raises:
            UserError: if the run is not finished, has no answers, or its data no longer hold any of the examples.
        """
        answers, config = validation_answers(run)[:EXAMPLES], run.read_config()
        validation = _validation_examples(run, config, {answer.id for answer in answers})
        indices = {id: i for i, id in enumerate(validation.ids)}
        kept = [answer for answer in answers if answer.id in indices]
        if not kept:
            raise UserError(
                f"{config.data.dataset}: of the {len(answers)} validation examples that the run has answers to, none "
                f"is what it was when the run began ({answers[0].id} is the first); put it back as it was"
            )
        images = [validation[indices[answer.id]].image for answer in kept]
        return cls(kept, images, len(answers) - len(kept))


def validation_answers(run: RunFolder) -> list[Prediction]:
    """Return what the run's best adapter answered on validation, in the split's order.

    Raises:
        UserError: if the run is not finished, or never wrote such answers.
    """
    if not run.done:
        raise UserError(f"{run.path} is not a finished run: it has no result.json")
    kept = run.predictions("validation", step=run.kept_step)
    answers = {each.id: each for each in kept if not each.constrained}  # transformers knows no schema
    if not answers:
        raise UserError(
            f"{run.path} holds no answers on validation to compare with, or none but those held to a schema: "
            f"`{command_line('im2json', 'evaluate', run.path, '--split', 'validation', '--no-constrain')}` makes them"
        )
    return list(answers.values())


def write_merged(run: RunFolder, folder: Path, dtype: torch.dtype, nf4: bool) -> Extractor:
    """Write the weights that the run's answers come from, laid out as the hub has those of the base, with processor and
    generation config.

    They are merged at the run's precision and rounded once, so in bf16 on a GPU that computes in bf16 they are those
    that the evaluation generates with, bit by bit.

    Returns:
        An extractor that reads with the written weights.

    Raises:
        UserError: if base and adapter do not fit each other.
    """
    config = reading_config(run.path, {"constrain": False})
    extractor = Extractor.from_config(config)
    model: Any = extractor.decoder.model
    collator = extractor.decoder.collator
    tokenizer = collator.processor.tokenizer
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=extractor.decoder.reader.stops,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
        max_new_tokens=extractor.settings.max_new_tokens,
    )
    model.to(dtype)
    weights = family_of(model.config).hub_layout(model.state_dict())
    names = set(weights)
    model.save_pretrained(folder, state_dict=weights, save_original_format=False)
    collator.processor.save_pretrained(folder)
    write_json(folder / USAGE, {name: getattr(config.data, name) for name in WARM_START_OPTIONS})
    check_layout(folder, model, names, dtype)
    if nf4:
        model = quantize(folder)
    return Extractor(model, collator, extractor.settings)


def quantize(folder: Path) -> Any:
    """Store the linear layers of a model in NF4, in bitsandbytes' own format, which loads without the original base.

    Returns:
        The model, with the weights that the 4-bit ones stand for.
    """
    model = load_base(str(folder), "bf16", "nf4", choose_device())
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    model.generation_config = GenerationConfig.from_pretrained(folder)
    model.save_pretrained(folder)
    return model.dequantize(torch.bfloat16).eval()


def check_layout(folder: Path, model: Any, weights: Collection[str], dtype: torch.dtype) -> None:
    """Look at what was written as other loaders will: names, one type of number, and what they read of the config."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    written: dict[str, str] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            written |= {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert written.keys() == set(weights), "weights are missing"
    assert len(written) == len({id(weight) for weight in model.parameters()}), "some weights are not in the layout"
    assert set(written.values()) == {SAFETENSORS_NAMES[dtype]}
    assert config["architectures"] == [type(model).__name__]
    assert "quantization_config" not in config


def parity(asked: Asked, texts: Mapping[str, Sequence[str]]) -> Parity:
    """Compare answers with the run's, and all of them with the targets.

    Args:
        texts: the answers of each form of the exported model. The last form is the one whose texts must be the run's.
    """
    of_run = evaluated(asked.answers, [answer.text for answer in asked.answers])
    found = {form: compare(of_run, evaluated(asked.answers, given))["field_f1"] for form, given in texts.items()}
    *_, last = texts.values()
    same = sum(text == answer.text for answer, text in zip(asked.answers, last, strict=True))
    return Parity(same, len(asked.answers), found, asked.lost)


def evaluated(answers: Sequence[Prediction], texts: Sequence[str]) -> StreamingEvaluator:
    """Return an evaluator that has counted these texts as answers to the same examples."""
    evaluator = StreamingEvaluator()
    for answer, text in zip(answers, texts, strict=True):
        evaluator.update(text, answer.target, answer.id)
    return evaluator


def _validation_examples(run: RunFolder, config: TrainConfig, ids: Collection[str]) -> RunSplit:
    """Return the validation examples of a run that have one of these ids and are still what they were."""
    splits, record = open_splits(config.data, []).values(), run.read_splits()
    if record is None:
        return divide(examine(splits), config.data.dataset, []).splits["validation"]
    contents = {id: content for id, content in record.splits["validation"].items() if id in ids}
    wanted = SplitRecord({"validation": contents}, {})
    found = restore(wanted, examine(splits, only=ids)).splits["validation"]
    if len(found) < len(contents):  # some may have another name by now
        found = restore(wanted, examine(splits)).splits["validation"]
    return found


def _plain_answers(folder: Path, collator: Collator, images: Iterable[Image.Image]) -> list[str]:
    with tempfile.TemporaryDirectory() as pictures:
        paths = []
        for i, image in enumerate(images):
            paths.append(f"{pictures}/{i}.png")
            collator.shown(image).save(paths[-1])
        wanted = {
            "model": str(folder), "text": collator.text, "pictures": paths, "batch_size": BATCH,
            "causal_prompt": collator.both_ways is not None,
        }  # fmt: skip
        # -P: or Python would find modules of ours beside the program
        command = [sys.executable, "-P", str(Path(__file__).with_name("plain.py"))]
        done = subprocess.run(command, input=json.dumps(wanted), capture_output=True, text=True)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"its process ended with {done.returncode}"]  # killed, for memory
        raise UserError(f"plain transformers does not load what was exported: {said[-1]}")
    return json.loads(done.stdout)
