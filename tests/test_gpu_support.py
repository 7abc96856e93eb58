"""What is said of a GPU before anything is loaded."""

from __future__ import annotations

import pytest
import torch
from helpers import clear_error

from im2json.model.gpu import check_gpu, precision_note

CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
CUDA_12_6 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]


@pytest.fixture
def card(monkeypatch):
    """`card(name, capability, built)` puts one into the machine."""

    def put(name: str, capability: tuple[int, int], built: list[str]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)

    return put


@pytest.mark.parametrize(
    ("capability", "built"),
    [
        ((7, 5), CUDA_13),  # T4
        ((8, 9), CUDA_13),  # L4, on code for 8.6
        ((9, 0), CUDA_13),
        ((12, 1), CUDA_13),
        ((13, 0), CUDA_13),  # later than all, on PTX
        ((6, 1), CUDA_12_6),
        ((7, 0), CUDA_12_6),
        ((9, 0), ["sm_80", "sm_90a"]),
        ((9, 4), ["gfx90a", "gfx942"]),  # AMD's
    ],
)
def test_cards_that_are_served(card, capability, built):
    card("a card", capability, built)
    check_gpu()


@pytest.mark.parametrize(
    ("name", "capability", "built", "advice"),
    [
        ("Tesla P100-PCIE-16GB", (6, 0), CUDA_13, "whl/cu126"),
        ("Tesla V100-SXM2-16GB", (7, 0), CUDA_13, "whl/cu126"),
        ("GeForce RTX 5090", (12, 0), CUDA_12_6, "update torch"),
        ("Jetson", (8, 7), ["sm_80a", "sm_90"], "update torch"),
    ],
)
def test_cards_that_are_not_served_are_named_with_the_build_that_serves_them(card, name, capability, built, advice):
    card(name, capability, built)
    with pytest.raises(ValueError, match=name) as error:
        check_gpu()
    text = str(error.value)
    assert f"{capability[0]}.{capability[1]}" in text and text.endswith(advice)
    assert "\n" not in text


def test_a_card_that_is_not_served_stops_a_run_before_anything_is_loaded(card, cli, tmp_path):
    card("Tesla V100-SXM2-16GB", (7, 0), CUDA_13)
    error = clear_error(cli("train", "--dataset", tmp_path / "nowhere", "--output", tmp_path / "run"))
    assert error.startswith("Tesla V100-SXM2-16GB (compute capability 7.0) is not served")


def test_fp16_is_explained(card):
    card("Tesla T4", (7, 5), CUDA_13)
    assert precision_note("auto", "bf16") is precision_note("fp32", "fp32") is None
    chosen, given = precision_note("auto", "fp16"), precision_note("fp16", "fp16")
    assert chosen == f"Tesla T4 has no bf16: {given}"
    assert "65,504" in given and "--precision fp32" in given and "\n" not in given
