"""What pre-training shows and asks: receipts of a split of their own, tables and free lines, most to be transcribed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerFast

from im2json.data.receipts.layout import SIDE, Line
from im2json.data.receipts.printing import Page, print_page
from im2json.pretrain.content import ContentForm, content_forms
from im2json.pretrain.forms import Form, compact, fixed_forms, has_target_shape, keyed_form
from im2json.pretrain.model import COLUMNS, GRID, PATCH, ROWS
from im2json.pretrain.pages import draw_lines, harden
from im2json.pretrain.tokenizer import CHARACTERS

OCR_PROMPT = "ocr"
# Shares of the examples. The last five ask for JSON, most of them by content
TASKS = {"ocr": 0.58, "line": 0.03, "content": 0.25, "position": 0.07, "keys": 0.03, "lines": 0.01, "rows": 0.03}
# Shares of pages with free lines and with tables; the others hold receipts
OTHER_PAGES = (0.32, 0.08)
CONTENT_PAGES = (0.05, 0.3)
HARD_SHARE = 0.25  # of the pages are degraded harder than drawn
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


def _ask(rng: random.Random, forms: Sequence[Form | ContentForm], lines: Sequence[Line]) -> tuple[str, str]:
    """A form's prompt and its answer on a page; a form that comes out in the target's shape gives way to another."""
    while True:
        form = rng.choice(forms)
        value = form.fill(lines)
        if not has_target_shape(value):
            return form.prompt, compact(value)


def _ask_anything(rng: random.Random, task: str, lines: Sequence[Line]) -> tuple[str, str]:
    """Prompt and answer of a task on a page with these lines."""
    if task == "content":
        return _ask(rng, content_forms(), lines)
    if task == "position":
        return _ask(rng, fixed_forms(), lines)
    if task == "keys":
        return _ask(rng, [keyed_form(rng)], lines)
    if task == "line":
        number = rng.randint(1, len(lines))
        return f"line {number}", lines[number - 1].text
    if task == "lines":
        return "lines", compact([line.text for line in lines])
    if task == "rows":
        return "rows", compact([[cell.text for cell in line.cells] for line in lines])
    return OCR_PROMPT, "\n".join(line.text for line in lines)


def draw_sample(seed: int, index: int, most_lines: int = 99) -> Sample:
    """The example at `index` of pre-training's endless stream: the same for the same arguments."""
    rng = random.Random(f"im2json pretrain/{seed}/{index}")
    task = rng.choices(list(TASKS), weights=list(TASKS.values()))[0]
    lines, style = draw_lines(rng, seed, index, most_lines, *(CONTENT_PAGES if task == "content" else OTHER_PAGES))
    page = print_page(lines, harden(rng, style) if rng.random() < HARD_SHARE else style)
    return Sample(page, *_ask_anything(rng, task, lines))


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

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int, scale: float = 1.0, curriculum: bool = True):
        """`scale` multiplies the number of examples in a batch; without `curriculum` pages are whole from the start."""
        self._tokenizer, self._seed, self._curriculum = tokenizer, seed, CURRICULUM if curriculum else 0
        self._sizes = {length: max(1, round(size * scale)) for length, size in BUCKETS.items()}

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = get_worker_info()
        start, step = (worker.id, worker.num_workers) if worker else (0, 1)
        waiting: dict[int, list[Encoded]] = {length: [] for length in BUCKETS}
        index, made = start, 0
        while True:
            most = 2 + (made * step + start) if made * step + start < self._curriculum else 99
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
