"""Fixtures that many tests share: a small model, a small data set, and the scripts called in process."""

from __future__ import annotations

import functools
import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

gc.disable()  # while modules are imported, the collector looks through a million objects and finds nothing; see below

sys.path.insert(0, str(Path(__file__).parents[1]))  # train.py and evaluate.py are scripts, no part of the package
pytest.register_assert_rewrite("helpers")

from im2json.cli import quiet_libraries  # noqa: E402

quiet_libraries()  # before torch and transformers are imported

import torch  # noqa: E402
from helpers import reset_accelerate, write_dataset  # noqa: E402
from transformers import PaliGemmaProcessor  # noqa: E402

from im2json.data.collate import Batch, Collator  # noqa: E402
from im2json.data.sources import load_splits  # noqa: E402
from im2json.families import open_collator  # noqa: E402
from im2json.machine import available_cores  # noqa: E402
from im2json.model import base  # noqa: E402
from im2json.runs import RunFolder  # noqa: E402

SHARE = max(1, available_cores() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)))
"""Cores for each process of xdist."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that several processes end at about the same time.

    xdist gives each process two files at once, so the third one waits for the first and had better be short.
    """
    first = ["test_docs.py", "test_extract.py", "test_whole_sweeps.py", "test_faults.py", "test_scripts.py"]
    items.sort(key=lambda item: first.index(item.path.name) if item.path.name in first else len(first))


def pytest_runtest_setup() -> None:
    """Begin a test with a thread for each core that is ours, whatever number a run before it was given."""
    torch.set_num_threads(SHARE)


def pytest_collection_finish() -> None:
    """Let the collector work again, on what tests make and not on what was imported."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_disks() -> Iterator[None]:
    """Do not wait until a disk has what was written. No test cuts the power, and it is a tenth of the time of a run."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def processors_loaded_once() -> Iterator[None]:
    """Load a processor again only if a file of it has changed. Loading it is another tenth of the time of a run."""
    complete = base._complete
    load = functools.lru_cache(8)(lambda path, files: complete(PaliGemmaProcessor, path))

    def loaded(kind: Any, path: str, **settings: Any) -> Any:
        if kind is not PaliGemmaProcessor or not os.path.isdir(path):
            return complete(kind, path, **settings)
        files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in os.scandir(path)]
        return load(path, tuple(sorted(files)))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(base, "_complete", loaded)
        yield


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With --dist loadfile keep the order above, and let each walkthrough run by itself, not one after the other."""
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid if "walkthrough_is_still_true" in nodeid else super()._split_scope(nodeid)

    if config.getvalue("dist") != "loadfile":
        return None
    config.option.loadscopereorder = False
    return Files(config, log)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a PaliGemma of 0.3 M weights."""
    from small_model import save_small_paligemma

    return str(save_small_paligemma(tmp_path_factory.mktemp("model") / "small"))


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An imagefolder of COUNTS examples; not to be changed."""
    return str(write_dataset(tmp_path_factory.mktemp("data") / "tiny"))


@pytest.fixture(scope="session")
def base_args(small_model: str, dataset: str) -> list[str]:
    """Flags of a short exact run: 32 bits, batches of 4 of 10 examples, so that the third step is a short one."""
    return [
        *("--model", small_model, "--dataset", dataset, "--precision", "fp32", "--quant", "none"),
        *("--r", "4", "--dropout", "0", "--lr", "0.01", "--optimizer", "adamw", "--threads", "1"),
        *("--batch-size", "4", "--microbatch", "4", "--steps", "4", "--eval-every", "2", "--max-new-tokens", "6"),
    ]


@pytest.fixture(scope="session")
def train(base_args: list[str]) -> Callable[..., RunFolder]:
    """`train(folder, *flags)` runs train.py in process, with base_args before the flags; errors come out as they
    are."""

    def run(folder: Path, *flags: object, base: list[str] = base_args) -> RunFolder:
        import train

        reset_accelerate()
        given = ["--output", str(folder), *base, *map(str, flags)]
        train.main(given, standalone_mode=False)
        return RunFolder(folder)

    return run


@pytest.fixture(scope="session")
def resume() -> Callable[..., RunFolder]:
    """`resume(run, *flags)` runs train.py --resume in process."""

    def run(stopped: RunFolder, *flags: object) -> RunFolder:
        import train

        reset_accelerate()
        train.main(["--resume", str(stopped.path), *map(str, flags)], standalone_mode=False)
        return stopped

    return run


@pytest.fixture
def cli() -> Iterator[Callable[..., Result]]:
    """`cli("train", *flags)` runs a script in process as the shell would, and returns what it printed."""

    def run(script: str, *flags: object) -> Result:
        import importlib

        reset_accelerate()
        return CliRunner().invoke(importlib.import_module(script).main, [str(flag) for flag in flags])

    yield run
    reset_accelerate()


@pytest.fixture(scope="session")
def finished(train: Callable[..., RunFolder], tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of 4 steps with evaluations and tests, only to be read."""
    return train(tmp_path_factory.mktemp("runs") / "finished")


@pytest.fixture(scope="session")
def collator(small_model: str) -> Collator:
    return open_collator(small_model, "extract JSON.")


@pytest.fixture(scope="session")
def batch(collator: Collator, dataset: str) -> Batch:
    """Three examples of different lengths."""
    split = load_splits(dataset)["train"]
    return collator([split[i] for i in (0, 3, 7)])
