"""Image features of a frozen tower, kept from epoch to epoch: the same run as without."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from helpers import metrics
from safetensors.torch import load_file

from im2json.data.collate import Collator, Pictures
from im2json.data.example import Example

FLAGS = ("--target-modules", "language", "--steps", 8, "--microbatch", 3, "--eval-every", 4, "--save-every", 3)
ONCE = "image features of 10 pictures (0.00 GiB) worked out once"


@pytest.fixture(scope="module")
def kept(train, tmp_path_factory):
    return train(tmp_path_factory.mktemp("features") / "kept", *FLAGS)


def losses(run):
    return [row["values"]["loss"] for row in metrics(run) if row["split"] == "train"]


def test_a_run_on_kept_features_is_that_on_pictures(train, kept, tmp_path, capsys):
    pictures = train(tmp_path / "pictures", *FLAGS, "--cache-features", 0)
    assert ONCE not in capsys.readouterr().out
    assert losses(kept) == pytest.approx(losses(pictures), rel=1e-5)
    found, expected = (load_file(run.adapter / "adapter_model.safetensors") for run in (kept, pictures))
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(("gib", "times"), [(1, [1] * 10), (0, [2] * 10)])
def test_a_picture_is_read_once_if_features_are_kept(train, tmp_path, monkeypatch, gib, times):
    read: Counter[str] = Counter()
    pictures_of = Collator.pictures_of

    def counting(self: Collator, examples: list[Example]) -> Pictures:
        read.update(example.id for example in examples)
        return pictures_of(self, examples)

    monkeypatch.setattr(Collator, "pictures_of", counting)
    train(tmp_path / "run", *FLAGS, "--steps", 6, "--eval-every", 0, "--no-test", "--cache-features", gib)
    assert list(read.values()) == times


def test_a_resumed_run_finds_the_same_features(train, resume, kept, tmp_path, capsys):
    left = train(tmp_path / "left", *FLAGS, "--stop-after", 3)
    assert not left.done
    assert ONCE in capsys.readouterr().out
    resume(left)
    assert ONCE in capsys.readouterr().out
    assert losses(left) == losses(kept)
    found, expected = (load_file(run.adapter / "adapter_model.safetensors") for run in (left, kept))
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--target-modules", "language", "--steps", 2], None),  # no picture comes twice
        (["--steps", 5], None),  # the tower learns
        (["--target-modules", "language", "--steps", 6, "--cache-features", 1e-6], "--cache-features is 1e-06"),
    ],
)
def test_features_are_worked_out_in_every_step_where_nothing_is_gained(train, tmp_path, capsys, flags, said):
    train(tmp_path / "run", "--eval-every", 0, "--no-test", *flags)
    printed = capsys.readouterr().out
    assert ONCE not in printed
    assert (said or "") in printed and ("vision tower is frozen" in printed) == (said is not None)


def test_where_there_is_no_room_they_are_worked_out_in_every_step(train, kept, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.NamedTemporaryFile", lambda *given, **more: open("/dev/full", "w+b"))  # noqa: SIM115
    full = train(tmp_path / "run", *FLAGS)
    assert "cannot be kept: [Errno 28] No space left on device" in capsys.readouterr().out
    assert losses(full) == pytest.approx(losses(kept), rel=1e-5)
