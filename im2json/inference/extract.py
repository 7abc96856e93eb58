"""Pictures in, rows of JSON out: what an adapter reads in documents that nobody has labelled."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from im2json.data.collate import Collator, Pictures
from im2json.data.loader import AHEAD, load_ahead, loading_threads
from im2json.data.modes import reading_note
from im2json.data.pictures import count_pages, decode_picture, upright_rgb
from im2json.data.stored import read_file
from im2json.errors import UserError
from im2json.families import check_adapter, collator_of
from im2json.inference.decode import Answer, Decoder, Request
from im2json.inference.settings import DecodeSettings
from im2json.jsontext import read
from im2json.model.base import positions, resolve_precision
from im2json.model.hub import adapter_path
from im2json.model.loading import choose_device, load_adapted
from im2json.model.lora import merged_copy
from im2json.options import TrainConfig
from im2json.resume import reading_config
from im2json.runs import home_of
from im2json.scoring.checks import check_results, parse_checks
from im2json.scoring.confidence import Calibration, leaf_confidence
from im2json.scoring.examples import read_calibration
from im2json.scoring.schema import outline, read_schema

Row = dict[str, Any]
WAITING = 512  # rows that may wait for one before them


class Loaded(NamedTuple):
    """A picture by name, with what the model gets of it, or with what is wrong."""

    id: str
    picture: Pictures | None = None
    error: str | None = None
    pages: int = 1  # of its file
    note: str | None = None  # on how it was read


class Extractor:
    """Reads pictures of documents as JSON.

    Text is generated as in an evaluation: on the base with the weights that its 4-bit ones stand for and LoRA merged
    in, at the run's precision. The answers are those of `im2json evaluate`, except where two tokens are equally likely
    up to rounding, which depends on the other pictures in the batch.

    Args:
        model: plain weights, in eval mode (see model.lora.merged_copy).
        settings: how answers are written.
        calibration: of confidence. The default leaves the model's own probability.
    """

    def __init__(
        self,
        model: Any,
        collator: Collator,
        settings: DecodeSettings,
        calibration: Calibration = Calibration(),  # noqa: B008 (it is a named tuple)
    ) -> None:
        self.decoder = Decoder(model, collator, settings.grammar, settings.batch_size)
        self.draft: Sequence[int] = ()  # tokens that answers are drafted from, beside what they repeat themselves
        self.settings = settings
        self.calibration = calibration

    @classmethod
    def from_run(cls, path: str | os.PathLike[str], **options: Any) -> Extractor:
        """Load the best adapter of a run with its base, or any LoRA adapter in PEFT's format.

        Args:
            path: a run folder, an adapter folder, or an adapter on the hub (owner/name).
            options: in place of the run's: model, quant, precision, prompt, letterbox, image_tokens,
                max_new_tokens, eval_batch_size, constrain, schema, check_sum.

        Raises:
            UserError: naming what is missing or does not fit.
        """
        return cls.from_config(reading_config(adapter_path(path), options))

    @classmethod
    def from_config(cls, config: TrainConfig) -> Extractor:
        """Load the adapter of options that are settled (see resume.reading_config). No data set is opened.

        Raises:
            UserError: if base, adapter, schema or calibration do not fit each other or this machine.
        """
        assert config.model.adapter is not None
        calibration, _ = read_calibration(home_of(Path(config.model.adapter))) or (Calibration(), None)
        checks, schema = parse_checks(config.decode.check_sum), None
        if config.decode.constrain:
            file = Path(config.decode.schema or "")
            schema = read_schema(file), f"schema {file}"
        device = choose_device()
        precision = resolve_precision(config.model.precision, device)
        with torch.random.fork_rng():  # the caller's random numbers stay as they are
            adapted = load_adapted(replace(config.model, dequantize="off"), precision, device, seed=0)
        check_adapter(config.model)
        collator = collator_of(config.model.model, config.data)
        limit = config.decode.max_new_tokens or positions(adapted)
        settings = DecodeSettings.of(config, precision, adapted, collator, limit, schema, checks)
        extractor = cls(merged_copy(adapted, settings.dtype), collator, settings, calibration)
        with suppress(UserError):  # without --constrain the schema may be missing, or wrong
            shape = outline(read_schema(home_of(Path(config.model.adapter)).schema))
            extractor.draft = collator.target_ids(shape)[:-1]
        return extractor

    def __call__(self, pictures: Iterable[str | os.PathLike[str] | Image.Image]) -> Iterator[Row]:
        """Yield a row for each picture, in their order. Those being written and the next few are held in memory.

        A row is {"id", "json", "reading", "confidence", "text"}: the file's name as given (of a picture in memory its
        index), the object or None, how it was read (strict, repaired or unreadable, see jsontext.read), the
        object again with a probability for each leaf, and the text that the model wrote; and "checks", where there are
        any, "cut": true, where an answer was held to a schema and ended at the limit, "pages", where the file has more
        than the first page, which was read, and "note", where its values had to be scaled. A picture that cannot be
        read gives {"id", "error"} in its place.
        """
        limit = self.settings.max_new_tokens
        assert isinstance(limit, int)
        rows: dict[int, Row] = {}  # by the picture's number; those that wait for one before them
        reading: dict[int, tuple[int, Loaded]] = {}  # pictures and their numbers, by the request's
        shown, more = 0, True

        def requests() -> Iterator[Request]:
            """Yield pictures to read. End where rows should be shown before more is read."""
            nonlocal more
            requested = itertools.count()
            for number, future in loading:
                loaded = future.result()
                if loaded.picture is None:
                    rows[number] = {"id": loaded.id, "error": loaded.error}
                else:
                    reading[next(requested)] = number, loaded
                    yield Request(lambda picture=loaded.picture: picture, limit, self.draft)  # type: ignore[misc]
                if len(rows) > WAITING or (rows and not reading):
                    return
            more = False

        def ready() -> Iterator[Row]:
            """Yield the rows that wait for none before them."""
            nonlocal shown
            while shown in rows:
                yield rows.pop(shown)
                shown += 1

        count = len(pictures) if isinstance(pictures, Sized) else None
        with loading_threads(self.decoder.model.device) as pool:
            loading = enumerate(load_ahead(pool, self._load, enumerate(pictures), AHEAD))
            while more:
                for request, answer in self.decoder.answers(requests(), limit, len(self.draft), count):
                    number, loaded = reading.pop(request)
                    rows[number] = self.row(loaded, answer)
                    yield from ready()
                yield from ready()

    def row(self, loaded: Loaded, answer: Answer) -> Row:
        """Return the row of a picture and the answer to it."""
        reading = read(answer.text)
        confidence = leaf_confidence(answer.text, answer.starts, answer.logprobs, reading)
        row: Row = {
            "id": loaded.id,
            "json": reading.value,
            "reading": reading.how,
            "confidence": None if confidence is None else self.calibration.of(confidence),
            "text": answer.text,
        }
        if answer.cut:
            row["cut"] = True
        if self.settings.checks:
            row["checks"] = check_results(self.settings.checks, reading.value)
        if loaded.pages > 1:
            row["pages"] = loaded.pages
        if loaded.note is not None:
            row["note"] = loaded.note
        return row

    def load(self, name: str, data: bytes) -> Loaded:
        """Decode a picture file, and return what the model gets of it.

        Raises:
            UserError: as decode_picture.
        """
        shown = decode_picture(data, name)
        return self._shown(name, shown, count_pages(data))

    def _load(self, numbered: tuple[int, str | os.PathLike[str] | Image.Image]) -> Loaded:
        number, picture = numbered
        name = str(number) if isinstance(picture, Image.Image) else os.fspath(picture)
        try:
            if isinstance(picture, Image.Image):
                return self._shown(name, upright_rgb(picture, name))
            return self.load(name, read_file(Path(name), name))
        except UserError as error:
            return Loaded(name, error=str(error))

    def _shown(self, name: str, picture: Image.Image, pages: int = 1) -> Loaded:
        return Loaded(name, self.decoder.collator.pictures([picture]), pages=pages, note=reading_note(picture))
