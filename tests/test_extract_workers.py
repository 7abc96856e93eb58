"""Several workers write what one process writes, whichever of them is killed, and whenever the job is stopped."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from forks import FORKING, Process
from helpers import clear_error, wait_for

from im2json.data.names import Shard

MAIN = "from im2json.app import main; main()\n"

# Has each worker log which pictures it loads.
LOADING = """
from im2json.inference.extract import Extractor
load = Extractor._load
def noting(self, numbered):
    sys.stdout.write(f"loads {numbered[1]}\\n")
    return load(self, numbered)
Extractor._load = noting
"""

# Has the worker of the first shard send a signal after its third row, the first TIMES times: to itself, or to its
# parent once the second worker has written a row.
SIGNALLING = """
import time
from im2json.inference.rowfile import RowFile
write = RowFile.write
def failing(self, row):
    write(self, row)
    marks = os.environ["MARKS"]
    if self.file.name.endswith("/1.jsonl") and len(self.ids) >= 3 and len(os.listdir(marks)) < int(os.environ["TIMES"]):
        open(f"{marks}/{time.monotonic_ns()}", "w").close()
        if os.environ["WHOM"] == "itself":
            os.kill(os.getpid(), signal.SIGKILL)
        other = self.file.name.replace("/1.jsonl", "/2.jsonl")
        while not os.path.exists(other) or b"\\n" not in open(other, "rb").read():
            time.sleep(0.01)
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(100)
RowFile.write = failing
"""


@pytest.fixture(scope="module")
def many(dataset, tmp_path_factory) -> list[str]:
    """Thirty pictures, one of which cannot be read."""
    folder = tmp_path_factory.mktemp("many")
    names = [f"{folder}/{i}é.png" for i in range(30)]
    for i, name in enumerate(names):
        os.symlink(f"{dataset}/train/{i % 10}.png", name)
    Path(names[20]).unlink()
    return names


@pytest.fixture(scope="module")
def whole(finished, many, tmp_path_factory) -> bytes:
    """The rows that one process writes of them."""
    out = tmp_path_factory.mktemp("whole") / "rows.jsonl"
    status, printed = extract(finished.path, *many, "--out", out, "--jobs", 1)
    assert status == 1 and "1 of 30 pictures could not be read" in printed
    return out.read_bytes()


def extract(*arguments: object, before: str = "", **variables: str) -> tuple[int, str]:
    """Run the command in a process of its own, with forked workers; return its exit status and its output."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | variables
    process = Process(FORKING + before + MAIN, "extract", *map(str, arguments), env=environment)
    printed = "".join(process.communicate(timeout=300))
    assert process.returncode is not None
    return process.returncode, printed


def ids(rows: bytes) -> list[str]:
    return [json.loads(line)["id"] for line in rows.splitlines()]


def test_workers_write_the_rows_of_one_process(finished, many, whole, tmp_path):
    out = tmp_path / "rows.jsonl"
    out.write_bytes(b"".join(whole.splitlines(keepends=True)[:4]) + b'{"id": "cut sho')
    status, printed = extract(finished.path, *many, "--out", out, "--jobs", 2)
    assert out.read_bytes() == whole, printed
    assert status == 1 and "1 of 30 pictures could not be read" in printed
    assert not Path(f"{out}.parts").exists()
    status, printed = extract(finished.path, *many, "--out", out, "--jobs", 2)  # nothing is left to do
    assert status == 1 and out.read_bytes() == whole


def test_a_killed_worker_goes_on_after_its_rows(finished, many, whole, tmp_path):
    out, marks = tmp_path / "rows.jsonl", tmp_path / "marks"
    marks.mkdir()
    given = [finished.path, *many, "--out", out, "--jobs", 2]
    status, printed = extract(*given, before=SIGNALLING, MARKS=str(marks), TIMES="3", WHOM="itself")
    assert out.read_bytes() == whole, printed
    assert status == 1 and printed.count("worker 1/2 was killed or crashed, and is started again") == 3


def test_a_worker_that_is_always_killed_is_an_error(finished, many, whole, tmp_path):
    out, marks, parts = tmp_path / "rows.jsonl", tmp_path / "marks", tmp_path / "rows.jsonl.parts"
    marks.mkdir()
    given = [finished.path, *many, "--out", out, "--jobs", 2]
    status, printed = extract(*given, before=SIGNALLING + LOADING, MARKS=str(marks), TIMES="99", WHOM="itself")
    assert status == 1 and len(list(marks.iterdir())) == 4
    assert printed.count("Error: ") == 1 and "Error: worker 1/2 failed 4 times; the end of its log" in printed
    kept = ids((parts / "1.jsonl").read_bytes())
    assert kept == many[:6] and out.read_bytes() == b""  # three rows, and one more each time
    first, *_, last = (parts / "1.log").read_text().split(f"reading 15 pictures with {finished.path}")[1:]
    assert f"loads {many[0]}\n" in first and "5 of them read before" in last
    assert not any(f"loads {name}\n" in last for name in many[:5]) and f"loads {many[5]}\n" in last
    status, printed = extract(*given)
    assert status == 1 and "finishing the job" in printed and out.read_bytes() == whole


def test_a_stopped_job_goes_on_with_the_shards_it_began_with(finished, many, whole, tmp_path):
    out, marks, parts = tmp_path / "rows.jsonl", tmp_path / "marks", tmp_path / "rows.jsonl.parts"
    marks.mkdir()
    given = [finished.path, "--out", out, "--files-from", tmp_path / "list"]
    (tmp_path / "list").write_text("\n".join(many[:25]))
    signals = dict(before=SIGNALLING, MARKS=str(marks))
    status, printed = extract(*given, "--jobs", 2, **signals, TIMES="1", WHOM="its parent")
    assert status == 130 and "the same command goes on" in printed and "stopping the workers" in printed, printed
    assert ids((parts / "1.jsonl").read_bytes()) == many[:3] and out.read_bytes() == b""
    assert not list(parts.glob("*.pid"))
    (tmp_path / "list").write_text("\n".join(many))
    with (parts / "1.log").open("a") as log:
        log.write("Error: of that command\n")
    status, printed = extract(*given, "--jobs", 3, **signals, TIMES="2", WHOM="itself")
    assert "worker 1/2 was killed or crashed, and is started again" in printed, printed
    assert out.read_bytes() == whole and not parts.exists(), printed
    assert status == 1 and "reading 30 pictures" in printed and "25 of them read before" in printed


def test_rows_are_joined_once(finished, many, whole, tmp_path):
    """A job that was stopped while it joined the rows, or removed the folder, goes on."""
    out, parts = tmp_path / "rows.jsonl", tmp_path / "rows.jsonl.parts"
    lines = whole.splitlines(keepends=True)
    parts.mkdir()
    record: dict[str, Any] = {"by": json.loads(lines[0])["by"], "shards": 3, "pictures": 30}
    for number in (1, 2, 3):
        part = Shard(number, 3).of(30)
        (parts / f"{number}.jsonl").write_bytes(b"".join(lines[part.start : part.stop]))
    (parts / "pictures").write_bytes(b"".join(os.fsencode(name) + b"\0" for name in many))
    (parts / "job.json").write_text(json.dumps(record))
    out.write_bytes(b"".join(lines[:12]) + lines[12][:9])
    assert extract(finished.path, *many, "--out", out)[0] == 1
    assert out.read_bytes() == whole and not parts.exists()
    parts.mkdir()
    (parts / "1.jsonl").write_bytes(b"".join(lines[20:25]))
    out.write_bytes(b"".join(lines[:12]))
    assert extract(finished.path, *many, "--out", out, "--jobs", 2)[0] == 1
    assert out.read_bytes() == whole and not parts.exists()


def test_mistakes(cli, finished, many, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    out, parts = tmp_path / "rows.jsonl", tmp_path / "rows.jsonl.parts"

    def error(*given: object) -> str:
        return clear_error(cli("im2json.__main__", "extract", finished.path, *many, "--out", out, *given))

    for flags, why in (
        (["--jobs", 2], "--jobs above 1 needs --out"), (["--ray", "auto"], "--ray needs --out"),
        (["--jobs", 0, "--out", out], "0 is not in the range"),
    ):  # fmt: skip
        result = cli("im2json.__main__", "extract", finished.path, *many, *flags)
        assert result.exit_code == 2 and why in result.stderr
    assert "no Ray cluster answers there" in error("--ray", "127.0.0.1:1")
    parts.mkdir()
    (parts / "notes.txt").touch()
    assert f"{parts}: holds notes.txt, which no job wrote" in error("--jobs", 2)
    assert out.read_bytes() == b""
    (parts / "job.json").write_text('{"by": "another", "shards": 2, "pictures": 30}')
    assert f"{parts}: was begun with another adapter, base or option (by another" in error()
    assert (parts / "notes.txt").exists()


def test_a_mistake_that_a_worker_finds_is_told_once(finished, many, tmp_path):
    schema, out = tmp_path / "mine.json", tmp_path / "rows.jsonl"
    schema.write_text('{"type": "object", "properties": {"a": {"type": "string", "format": "no such"}}}')
    flags = ["--constrain", "--schema", schema, "--out", out, "--jobs", 2]
    status, printed = extract(finished.path, *many, *flags)
    assert status == 1 and printed.count(f"Error: schema {schema} cannot be decoded by: ") == 1, printed
    assert "Error: worker 1/2 failed; the end of its log" in printed and "started again" not in printed


@pytest.fixture(scope="module")
def cluster():
    """The address of a Ray cluster that runs two workers at a time."""
    from ray import cluster_utils

    found = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    yield found.address
    found.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("on_cluster", [True, False])
@pytest.mark.parametrize("end", ["of a worker", "of the command", "asked for"])
def test_no_row_is_lost_or_read_twice(on_cluster, end, finished, dataset, tmp_path, request):
    """With workers that are programs of their own, whatever ends in the middle of 200 pictures."""
    names, out, parts = [f"{i}.png" for i in range(200)], tmp_path / "rows.jsonl", tmp_path / "rows.jsonl.parts"
    for i, name in enumerate(names):
        os.symlink(f"{dataset}/train/{i % 10}.png", tmp_path / name)
    flags = ["--out", out.name, "--jobs", "2"]
    if on_cluster:
        flags += ["--ray", request.getfixturevalue("cluster")]

    def start() -> Process:
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        return Process(MAIN, "extract", str(finished.path), *names, *flags, cwd=tmp_path, env=environment)

    process, rows = start(), parts / "1.jsonl"
    wait_for(lambda: rows.exists() and rows.read_bytes().count(b"\n") >= 10, process)
    if end == "of a worker":
        os.kill(int((parts / "1.pid").read_text().split()[0]), signal.SIGKILL)
        printed = "".join(process.communicate(timeout=300))
        assert "worker 1/2 was killed" in printed, printed
    else:
        process.send_signal(signal.SIGTERM if end == "asked for" else signal.SIGKILL)
        printed = "".join(process.communicate(timeout=300))
        assert process.returncode == (130 if end == "asked for" else -signal.SIGKILL), printed
        assert out.read_bytes() == b"" and rows.exists()
        process = start()
        printed = "".join(process.communicate(timeout=300))
        assert "finishing the job" in printed, printed
    assert process.returncode == 0, printed
    assert ids(out.read_bytes()) == names and not parts.exists()
