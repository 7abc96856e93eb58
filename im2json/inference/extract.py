"""Pictures in, rows of JSON out: what an adapter reads in documents that nobody has labelled."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import PaliGemmaForConditionalGeneration

from im2json.data.collate import Collator
from im2json.data.loader import loading_threads
from im2json.data.pictures import decode_picture, upright_rgb
from im2json.data.stored import read_file
from im2json.inference.constrain import Grammar
from im2json.inference.decode import Answer, Decoder, generate
from im2json.model.base import DTYPES, load_base, load_processor, positions, resolve_precision
from im2json.model.card import check_card
from im2json.model.hub import adapter_path
from im2json.model.lora import add_lora, merged_copy
from im2json.options import TrainConfig
from im2json.runs import home_of, reading_config
from im2json.scoring.checks import SumCheck, parse_checks, told
from im2json.scoring.confidence import Calibration, leaf_confidence
from im2json.scoring.examples import read_calibration
from im2json.scoring.jsontext import read
from im2json.scoring.schema import read_schema

Row = dict[str, Any]
FIRST = 4  # pictures in the first batch on a CPU, so that there is something to see early


class Extractor:
    """Reads pictures of documents as JSON.

    Text is generated as in an evaluation: on the base with the weights that its 4-bit ones stand for and LoRA merged
    in, at the run's precision. The answers are those of `evaluate.py` but where two tokens are equally likely up to
    rounding, which depends on who else is in the batch.

    Args:
        model: plain weights, in eval mode (see `merged_model`).
        max_new_tokens: longest answer; at most what the model holds.
        batch_size: pictures read at a time.
        calibration: of confidence; without one it is the model's own probability.
        checks: whether amounts add up, told in each row.
        grammar: what answers are held to.
    """

    def __init__(
        self,
        model: PaliGemmaForConditionalGeneration,
        collator: Collator,
        max_new_tokens: int,
        batch_size: int,
        calibration: Calibration | None = None,
        checks: Sequence[SumCheck] = (),
        grammar: Grammar | None = None,
    ) -> None:
        self.decoder = Decoder(model, collator, grammar)
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self.calibration = calibration or Calibration()
        self.checks = checks

    @classmethod
    def from_run(cls, path: str | os.PathLike[str], **options: Any) -> Extractor:
        """The best adapter of a run, on its base, or any LoRA adapter for a PaliGemma in PEFT's format.

        Args:
            path: a run folder, an adapter folder, or an adapter on the hub (owner/name).
            options: in place of the run's: model, quant, precision, prompt, letterbox, max_new_tokens,
                eval_batch_size, constrain, schema, check_sum.

        Raises:
            ValueError: naming what is missing or does not fit.
        """
        return cls.from_config(reading_config(adapter_path(path), options))

    @classmethod
    def from_config(cls, config: TrainConfig) -> Extractor:
        """The same for options that are settled (see runs.reading_config). No data set is opened."""
        assert config.model.adapter is not None
        calibration = read_calibration(home_of(Path(config.model.adapter)))
        checks = parse_checks(config.decode.check_sum)
        file = Path(config.decode.schema or "")
        schema = read_schema(file) if config.decode.constrain else None
        model = merged_model(config)
        collator = Collator(load_processor(config.model.model), config.data.prompt, config.data.letterbox)
        room = positions(model) - len(collator.prefix_ids)
        limit = min(config.decode.max_new_tokens or room, room)
        tokenizer = collator.processor.tokenizer
        grammar = None if schema is None else Grammar(schema, tokenizer, model.lm_head.out_features, f"schema {file}")
        return cls(
            model, collator, limit, config.decode.eval_batch_size, calibration and calibration[0], checks, grammar
        )

    def __call__(self, pictures: Iterable[str | os.PathLike[str] | Image.Image]) -> Iterator[Row]:
        """A row for each picture, in their order, as they come; a batch and the one after it are held in memory.

        A row is {"id", "json", "reading", "confidence", "text"}: the file's name as given (of a picture in memory its
        place), the object or None, how it was read (strict, repaired or unreadable, see scoring.jsontext.read), the
        object again with a probability for each leaf, and the text that the model wrote; and "checks", where there are
        any, and "cut": true, where an answer was held to a schema and ended at the limit. A picture that cannot be read
        gives {"id", "error"} in its place.
        """
        numbered = enumerate(pictures)
        on_gpu = self.decoder.model.device.type == "cuda"
        sizes = itertools.chain([] if on_gpu else [min(FIRST, self.batch_size)], itertools.repeat(self.batch_size))
        # the caller's code, which may use this very object, runs here and not while a batch is written
        taken = (list(itertools.islice(numbered, size)) for size in sizes)
        with loading_threads(self.decoder.model.device) as pool:
            following = next(taken)
            loading: list[Future[tuple[str, torch.Tensor | str]]] = []

            def load() -> None:
                nonlocal loading
                loading = [pool.submit(self._load, *each) for each in following]

            load()
            while loading:
                following = next(taken)
                batch = [one.result() for one in loading]
                pixels = [found for _, found in batch if not isinstance(found, str)]
                shown = torch.cat(pixels) if pixels else torch.empty(0)
                answers = iter(generate(self.decoder, shown, self.max_new_tokens, meanwhile=load))
                for id, found in batch:
                    yield {"id": id, "error": found} if isinstance(found, str) else self._row(id, next(answers))

    def _row(self, id: str, answer: Answer) -> Row:
        reading = read(answer.text)
        confidence = leaf_confidence(answer.text, answer.starts, answer.logprobs)
        row: Row = {
            "id": id,
            "json": reading.value,
            "reading": reading.how,
            "confidence": None if confidence is None else self.calibration.of(confidence),
            "text": answer.text,
        }
        if answer.cut:
            row["cut"] = True
        if self.checks:
            row["checks"] = told(self.checks, reading.value)
        return row

    def _load(self, place: int, picture: str | os.PathLike[str] | Image.Image) -> tuple[str, torch.Tensor | str]:
        """Its name with its pixels, 1 x 3 x H x W, or with what is wrong."""
        name = str(place) if isinstance(picture, Image.Image) else os.fspath(picture)
        try:
            shown = (
                upright_rgb(picture, name)
                if isinstance(picture, Image.Image)
                else decode_picture(read_file(Path(name), name), name)
            )
        except ValueError as error:
            return name, str(error)
        return name, self.decoder.collator.pixels([shown])


def merged_model(config: TrainConfig) -> PaliGemmaForConditionalGeneration:
    """The base with the adapter of these options merged in, at their precision, on the GPU where there is one.

    Raises:
        ValueError: if base and adapter do not fit each other or this machine.
    """
    gpu = torch.cuda.is_available()
    if gpu:
        check_card()
    device = torch.device("cuda" if gpu else "cpu")
    options = config.model
    precision = resolve_precision(options.precision, device)
    base = load_base(options.model, precision, options.quant, device)
    with torch.random.fork_rng():  # the caller's random numbers are the caller's
        model = add_lora(base, options, seed=0)
    return merged_copy(model, DTYPES[precision])
