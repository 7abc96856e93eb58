"""Fixtures of the tests of wiring: runs in which base, best and last adapter answer differently.

They are held to a schema, so that all their answers are JSON: by json_validity they are equally good, and the first
adapter stays the best one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from run_files import lively, one_field, texts
from safetensors.numpy import load_file, save_file

import im2json
from im2json.options import SEVEN

BEST_FIRST = (
    *("--lr", 0.1, "--steps", 3, "--eval-every", 1, "--keep", 9, "--metric", "json_validity", "--constrain"),
    *("--max-new-tokens", 16, "--letterbox", "--prompt", "read.", "--target-modules", SEVEN),
)
READ_ALIKE: dict[str, Any] = {"prompt": "read.", "letterbox": True, "max_new_tokens": 16, "constrain": True}


@pytest.fixture(scope="session")
def lively_model(small_model, tmp_path_factory) -> str:
    """The folder of a model that answers each picture differently."""
    return lively(small_model, tmp_path_factory.mktemp("lively") / "model")


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """A schema of objects such as {"total": "37"}."""
    path = tmp_path_factory.mktemp("schema") / "digits.json"
    path.write_text(json.dumps(one_field([f"{i:02}" for i in range(100)])))
    return path


@pytest.fixture(scope="session")
def make_run(train, lively_model, digits) -> Callable[..., Path]:
    """`make_run(folder, *flags)` trains like `best_first`, but for the flags."""

    def run(folder: Path, *flags: object, like: tuple[object, ...] = BEST_FIRST) -> Path:
        return train(folder, "--model", lively_model, "--schema", digits, *like, *flags).path

    return run


@pytest.fixture(scope="session")
def best_first(make_run, tmp_path_factory) -> Path:
    """A run of 3 steps whose first adapter is its best."""
    return make_run(tmp_path_factory.mktemp("runs") / "best_first")


@pytest.fixture(scope="session")
def read_split(dataset, digits) -> Callable[..., list[str]]:
    """`read_split(adapter, split)` lets an adapter answer the pictures of a split as the run would."""

    def texts_of(adapter: Path, split: str, **options: Any) -> list[str]:
        options = {**READ_ALIKE, **options}
        schema = {"schema": str(digits)} if options["constrain"] else {}
        extractor = im2json.Extractor.from_run(adapter, **options, **schema)
        pictures = sorted(Path(dataset, split).glob("*.png"), key=lambda path: int(path.stem))
        return texts(list(extractor(pictures)))

    return texts_of


@pytest.fixture(scope="session")
def base_alone(best_first, tmp_path_factory) -> Path:
    """An adapter of zeros, which leaves the base as it is."""
    folder = Path(shutil.copytree(best_first / "adapter", tmp_path_factory.mktemp("zeros") / "adapter"))
    zeros = {name: weight * 0 for name, weight in load_file(folder / "adapter_model.safetensors").items()}
    save_file(zeros, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def own_threads() -> Iterator[None]:
    """Let a test change the number of threads for itself alone."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
