"""What pre-training shows and asks: receipts of a split of their own and free lines, most to be transcribed."""

from __future__ import annotations

import dataclasses
import random
import string
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerFast

from im2json.data.page import SIDE, Cell, Line, Page, Style, draw_style, print_page
from im2json.data.receipts import draw_receipt
from im2json.data.words import FOOD, SHOP, cased, phrase, random_word
from im2json.pretrain.forms import compact, fixed_forms, keyed_form
from im2json.pretrain.model import COLUMNS, GRID, PATCH, ROWS
from im2json.pretrain.tokenizer import CHARACTERS

SPLIT = "pretrain"  # of the receipts: its content is disjoint from train, validation and test by construction
OCR_PROMPT = "ocr"
FREE_SHARE = 0.4  # of the pages hold free lines, the others receipts
HARD_SHARE = 0.25  # of the pages are degraded harder than drawn
OTHER_SHARE = 0.3  # of the examples ask for JSON of other shapes
CURRICULUM = 20  # batches until pages are whole
BUCKETS = {80: 512, 144: 512, 208: 512, 288: 384, 416: 256}  # text tokens: examples in a batch
CHARACTER_INDEX = {char: index for index, char in enumerate(CHARACTERS, start=1)}  # 0: no character
ALPHABET = len(CHARACTERS) + 1
IGNORED = -100


@dataclass(frozen=True)
class Sample:
    """A page, what is asked of it, and the answer."""

    page: Page
    prompt: str
    answer: str


def _free_word(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.35:
        return cased(random_word(rng), rng.choice(("upper", "title", "lower")))
    if kind < 0.45:
        return "".join(rng.choices(string.ascii_letters + string.digits, k=rng.randint(1, 6)))
    if kind < 0.55:
        return cased(phrase(rng, FOOD + SHOP, 12, most=1), rng.choice(("upper", "title", "lower")))
    if kind < 0.85:
        return _free_number(rng)
    if kind < 0.97:
        return "".join(rng.choices(string.punctuation, k=rng.randint(1, 3)))
    return "".join(rng.choices(CHARACTERS[-16:], k=rng.randint(1, 3)))


def _free_number(rng: random.Random) -> str:
    value = rng.randint(0, 10 ** rng.randint(1, 7))
    form = rng.choice(
        ("{:d}", "{:,d}", "{:,d}", "dots", "cents", "comma", "-{:,d}", "x{:d}", "{:d}x", "@{:,d}", "Rp{:,d}")
    )
    if form == "dots":
        return f"{value:,}".replace(",", ".")
    if form in ("cents", "comma"):
        return f"{value // 100}{'.' if form == 'cents' else ','}{value % 100:02d}"
    return form.format(value)


def _free_line(rng: random.Random) -> Line:
    cells, room = [], rng.randint(6, 30)
    places = rng.choice((("l",), ("l",), ("c",), ("r",), ("l", "r"), ("l", "r"), ("l", "r"), ("l", "m", "r")))
    for place in places:
        text = _free_word(rng)
        while rng.random() < 0.5 and len(text) < room // len(places) - 3:
            text += " " + _free_word(rng)
        text = text[: room // len(places)].strip() or "-"
        align, at = {
            "l": ("l", rng.choice((0.0, 0.0, 0.06))),
            "c": ("c", 0.5),
            "r": ("r", 1.0),
            "m": ("r", 0.66),
        }[place]
        cells.append(Cell(text, align, at))
    return Line(tuple(cells), rule=rng.random() < 0.05, big=rng.random() < 0.05)


def _draw_lines(rng: random.Random, seed: int, index: int, most: int) -> tuple[tuple[Line, ...], Style]:
    """Lines of a page and a style in which they fit: of a receipt, or free ones."""
    if rng.random() >= FREE_SHARE:
        receipt = draw_receipt(seed, SPLIT, index)
        if len(receipt.lines) <= most:
            return receipt.lines, receipt.style
        start = rng.randint(0, len(receipt.lines) - most)
        return receipt.lines[start : start + most], receipt.style
    while True:
        lines = tuple(_free_line(rng) for _ in range(rng.randint(1, min(most, 18))))
        try:
            return lines, draw_style(rng, lines)
        except ValueError:
            continue


def _harden(rng: random.Random, style: Style) -> Style:
    return dataclasses.replace(
        style,
        ink=max(style.ink, style.paper - rng.randint(90, 130)),
        blur=rng.uniform(0.3, 0.8),
        noise=rng.uniform(5, 14),
        angle=rng.uniform(-2.5, 2.5),
    )


def draw_sample(seed: int, index: int, most_lines: int = 99) -> Sample:
    """The example at `index` of pre-training's endless stream: the same for the same arguments."""
    rng = random.Random(f"im2json pretrain/{seed}/{index}")
    lines, style = _draw_lines(rng, seed, index, most_lines)
    page = print_page(lines, _harden(rng, style) if rng.random() < HARD_SHARE else style)
    text = "\n".join(line.text for line in lines)
    task = rng.random()
    if task >= OTHER_SHARE + 0.04:
        return Sample(page, OCR_PROMPT, text)
    if task >= OTHER_SHARE:
        number = rng.randint(1, len(lines))
        return Sample(page, f"line {number}", lines[number - 1].text)
    if task < 0.2:
        form = rng.choice(fixed_forms())
        return Sample(page, form.prompt, form.fill(lines))
    if task < 0.26:
        form = keyed_form(rng)
        return Sample(page, form.prompt, form.fill(lines))
    if task < 0.28:
        return Sample(page, "lines", compact([line.text for line in lines]))
    return Sample(page, "rows", compact([[cell.text for cell in line.cells] for line in lines]))


def cell_targets(page: Page) -> np.ndarray:
    """Which character has its centre in a cell: int16 (GRID * GRID, ROWS * COLUMNS), IGNORED where two have."""
    cells = np.zeros((GRID * ROWS, GRID * COLUMNS), np.int16)
    for char, x, y in page.centres:
        row, column = int(y * ROWS / PATCH), int(x * COLUMNS / PATCH)
        if 0 <= row < GRID * ROWS and 0 <= column < GRID * COLUMNS:
            cells[row, column] = IGNORED if cells[row, column] else CHARACTER_INDEX[char]
    return cells.reshape(GRID, ROWS, GRID, COLUMNS).transpose(0, 2, 1, 3).reshape(GRID * GRID, ROWS * COLUMNS)


@dataclass(frozen=True)
class Encoded:
    """A sample as numbers: BOS, prompt, newline, answer, EOS, laid out as PaliGemmaProcessor does."""

    gray: np.ndarray  # uint8 (SIDE, SIDE)
    tint: tuple[float, float, float]
    cells: np.ndarray
    tokens: list[int]
    prompt_length: int


def encode(sample: Sample, tokenizer: PreTrainedTokenizerFast) -> Encoded:
    """Tokens and read-out targets of a sample."""
    backend = tokenizer.backend_tokenizer
    prompt = [tokenizer.bos_token_id, *backend.encode(sample.prompt + "\n", add_special_tokens=False).ids]
    answer = [*backend.encode(sample.answer, add_special_tokens=False).ids, tokenizer.eos_token_id]
    return Encoded(sample.page.gray, sample.page.tint, cell_targets(sample.page), prompt + answer, len(prompt))


def stack(samples: list[Encoded], length: int, pad: int) -> dict[str, torch.Tensor]:
    """A batch whose text is padded on the right to `length` tokens."""
    tokens = np.full((len(samples), length), pad, np.int64)
    for row, sample in enumerate(samples):
        tokens[row, : len(sample.tokens)] = sample.tokens
    return {
        "gray": torch.from_numpy(np.stack([sample.gray for sample in samples])),  # B x SIDE x SIDE
        "tint": torch.tensor([sample.tint for sample in samples]),  # B x 3
        "cells": torch.from_numpy(np.stack([sample.cells for sample in samples])),  # B x I x 6
        "tokens": torch.from_numpy(tokens),  # B x S
        "prompt_lengths": torch.tensor([sample.prompt_length for sample in samples]),  # B
        "lengths": torch.tensor([len(sample.tokens) for sample in samples]),  # B
    }


class Batches(IterableDataset):
    """An endless stream of batches of one length bucket each; every worker draws examples of its own."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int, scale: float = 1.0):
        """`scale` multiplies the number of examples in a batch."""
        self._tokenizer, self._seed = tokenizer, seed
        self._sizes = {length: max(1, round(size * scale)) for length, size in BUCKETS.items()}

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = get_worker_info()
        start, step = (worker.id, worker.num_workers) if worker else (0, 1)
        waiting: dict[int, list[Encoded]] = {length: [] for length in BUCKETS}
        index, made = start, 0
        while True:
            most = 2 + (made * step + start) if made * step + start < CURRICULUM else 99
            sample = encode(draw_sample(self._seed, index, most), self._tokenizer)
            index += step
            length = next((length for length in BUCKETS if len(sample.tokens) <= length), None)
            if length is None:  # a few answers in JSON are longer than any receipt's text
                continue
            waiting[length].append(sample)
            if len(waiting[length]) == self._sizes[length]:
                yield stack(waiting[length], length, self._tokenizer.pad_token_id)
                waiting[length], made = [], made + 1


def pixels(gray: torch.Tensor, tint: torch.Tensor) -> torch.Tensor:
    """What PaliGemmaProcessor makes of the pages: float (B, 3, SIDE, SIDE) in -1 to 1."""
    assert gray.shape[1:] == (SIDE, SIDE)
    coloured = (gray[:, None] * tint[:, :, None, None] + 0.5).floor()  # B x 3 x SIDE x SIDE
    return coloured / 127.5 - 1
