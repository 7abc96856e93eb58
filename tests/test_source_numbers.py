"""Numbers of a data set are learned as written, or as the shortest decimals that name what is stored."""

from __future__ import annotations

import io
import json
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from im2json.data.sources import load_splits
from im2json.errors import UserError
from im2json.jsontext import canonical

SPLITS = ("train", "validation", "test")
TEXT = '{"rate":0.00005,"total":100.00,"iban":12345678901234567.89,"n":[1E3,-0]}'


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


def picture(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (4, 4), shade).save(stream, "PNG")
    return stream.getvalue()


def learned(root: Path) -> set[str]:
    """The texts of all splits that a model learns to write."""
    return {canonical(target) for split in load_splits(str(root)).values() for target in split.targets}


STORED: dict[str, tuple[Any, Any]] = {
    '{"total":9.3,"rows":[{"half":0.1},{"half":-2.5}],"none":{}}': (
        pa.struct([
            ("total", pa.float32()),
            ("rows", pa.list_(pa.struct([("half", pa.float16())]))),
            ("none", pa.struct([("x", pa.float32())])),
        ]),
        {"total": 9.3, "rows": [{"half": np.float16(0.1)}, {"half": np.float16(-2.5)}], "none": {"x": None}},
    ),
    '{"n":[9.3,0.0000001]}': (pa.struct([("n", pa.list_(pa.float32(), 2))]), {"n": [9.3, 1e-7]}),
    '{"n":[16777216.0]}': (pa.struct([("n", pa.large_list(pa.float32()))]), {"n": [2.0**24]}),
    '{"n":[0.00005,10000000000000000000000,1e-30,0.1,12.0,-0.00001]}': (
        pa.struct([("n", pa.list_(pa.float64()))]),
        {"n": [0.00005, 1e22, 1e-30, 0.1, 12.0, -1e-05]},
    ),
    '{"n":9.30,"m":12345678901234567890.12}': (None, {"n": Decimal("9.30"), "m": Decimal("12345678901234567890.12")}),
    '{"n":9223372036854775807,"m":0.1}': (None, {"n": 2**63 - 1, "m": 0.1}),
    TEXT: (None, json.dumps({"gt_parse": None}).replace("null", TEXT)),
}  # fmt: skip


@pytest.mark.parametrize("text", STORED)
@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_numbers_of_a_table(tmp_path, text, form):
    kind, value = STORED[text]
    images = pa.array([{"bytes": picture(i), "path": None} for i in range(3)])
    table = pa.table({"image": images, "target": pa.array([value] * 3, kind)})
    if form == "parquet":
        pq.write_table(table, tmp_path / "train.parquet")
    else:
        datasets.Dataset(table).save_to_disk(tmp_path / "saved")
    assert learned(tmp_path if form == "parquet" else tmp_path / "saved") == {text}


@pytest.mark.parametrize("value", [datetime(2026, 1, 31), date(2026, 1, 31), time(12), b"x"])
def test_a_value_that_json_does_not_have_is_named(tmp_path, value):
    images = pa.array([{"bytes": picture(i), "path": None} for i in range(3)])
    targets = pa.array([{"rows": [{"date": value}]}] * 3)
    pq.write_table(pa.table({"image": images, "target": targets}), tmp_path / "train.parquet")
    problem = rf"row . of .*: the key rows.date holds a {type(value).__name__}, .*; store the target as JSON text"
    with pytest.raises(UserError, match=problem):
        learned(tmp_path)


@pytest.mark.parametrize(
    "target", [TEXT, json.dumps(TEXT), f'{{"gt_parse":{TEXT}}}'], ids=["object", "text", "wrapped"]
)
def test_numbers_of_lines_of_json(tmp_path, target):
    for shade, name in enumerate(SPLITS):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(picture(shade))
        (tmp_path / name / "metadata.jsonl").write_text(f'{{"file_name": "a.png", "ground_truth": {target}}}\n')
    assert learned(tmp_path) == {TEXT}


def test_numbers_of_a_file_for_each_picture(tmp_path):
    for shade, name in enumerate(SPLITS):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(picture(shade))
        (tmp_path / name / "a.json").write_text(TEXT)
    assert learned(tmp_path) == {TEXT}
