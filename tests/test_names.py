"""Names by the million: each once, in order, shared out without a gap, and whatever bytes they are made of."""

from __future__ import annotations

import io
import os
import random

import pytest

from im2json.data import names
from im2json.data.names import NameSet, Shard, read_names
from im2json.errors import UserError

ODD = ["a b", " a ", "a[1]", "é", "a\\b", "file:", os.fsdecode(b"a\xe9\xff"), "\ud800", "\U0001f600", "a\nb", "-", "~"]


def test_a_set_of_names_is_that_of_a_dict(monkeypatch):
    monkeypatch.setattr(names, "CACHE", 64)  # KiB, so that most of it is on disk
    drawn = random.Random(0)
    given = [f"folder {drawn.randrange(9)}/{drawn.randrange(20_000)}.png" for _ in range(30_000)] + ODD
    held, known = NameSet(given[:10_000]), dict.fromkeys(given[:10_000])
    for some in (given[10_000:20_000], given[5_000:], ODD):
        held.update(iter(some))
        known.update(dict.fromkeys(some))
        assert len(held) == len(known)
    assert list(held) == list(known)
    assert all(name in held for name in ODD) and "a" not in held and "A[1]" not in held
    assert list(held.among(range(7, 30))) == list(known)[7:30]


def test_an_iteration_goes_on_while_the_set_is_asked_and_others_grow():
    held, others = NameSet("abcdef"), NameSet()
    for name in held:
        assert name in held
        others.update([name])
    assert list(others) == list(held)


def test_a_full_disk_is_no_bug():
    held = NameSet()
    held._file.execute("PRAGMA max_page_count = 10")
    with pytest.raises(UserError, match=r"temporary file of names cannot be written \(database or disk is full\)"):
        held.update(map(str, range(100_000)))


@pytest.mark.parametrize("total", [0, 1, 5, 12, 13])
@pytest.mark.parametrize("count", [1, 3, 12, 20])
def test_shards_are_equal_ranges_one_after_the_other(total, count):
    parts = [Shard(number, count).of(total) for number in range(1, count + 1)]
    assert [n for part in parts for n in part] == list(range(total))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("text", ["0/4", "5/4", "1/0", "1", "1/", "/2", "-1/2", "1/2/3", "a/b", "1.0/2", ""])
def test_a_shard_that_there_is_not(text):
    with pytest.raises(UserError) as caught:
        Shard.parse(text)
    assert str(caught.value) == f"--shard {text}: expected I/N with 1 <= I <= N"
    assert str(Shard.parse("2/4")) == "2/4"


@pytest.mark.parametrize("block", [1, 2, 3, 1 << 16])
def test_lists_are_read_in_blocks_of_any_size(block, monkeypatch):
    monkeypatch.setattr(names, "BLOCK", block)

    def read(data: bytes, null: bool = False) -> list[str]:
        return list(read_names(io.BytesIO(data), "list", null))

    assert read("\ufeffa.png\r\n\n  \né[1]*.png \n./b.png".encode()) == ["a.png", "é[1]*.png ", "./b.png"]
    odd = [name for name in ODD if name != "\ud800"]
    assert read(b"".join(os.fsencode(name) + b"\0" for name in [*odd, " "]), null=True) == [*odd, " "]
    assert read(b"") == read(b"\n\n") == []
    for data, problem in {
        b"a\nb\xe9\n": r"list:2: is not UTF-8 text \(byte 1\)",
        b"\n\na\0b\0": "list:3: holds a NUL character. If one ends each name, add --null.",
        "a\nb\n".encode("utf-16"): "list:1: is UTF-16",
    }.items():
        with pytest.raises(UserError, match=problem):
            read(data)
