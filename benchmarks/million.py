"""A job of a million pictures beside one that holds their names in memory, as `extract` did: seconds and memory.

    python benchmarks/million.py                        # about two minutes
    python benchmarks/million.py --pictures 100000

Names come from a list, and a stand-in answers each at once, so all that is measured is what listing them, leaving out
those that have a row, and writing rows takes. Each job runs in a process of its own: a first one, and one that goes on
where half of the rows are written. Prints seconds, what the peak of the resident memory is above that of a job of one
picture, and ratios.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from im2json.commands.extract import Missing, Selection
from im2json.files import json_line
from im2json.inference.rowfile import row_file

BY = "0123456789ab"


def answer(name: str) -> dict[str, Any]:
    return {"id": name, "json": {"total": "9.30"}, "reading": "strict", "confidence": None, "text": '{"total":"9.30"}'}


def ours(names: Path, out: Path) -> None:
    listed = Selection(files_from=names).find([])
    with row_file(out, BY) as rows:
        missing = Missing(listed, range(len(listed)), rows.ids)
        len(missing)
        for name in missing:
            rows.write(answer(name))


def in_memory(names: Path, out: Path) -> None:
    listed = list(dict.fromkeys(names.read_text("utf-8").splitlines()))
    with out.open("a+b") as file:
        file.seek(0)
        ids = {json.loads(line)["id"] for line in file}
        for name in [name for name in listed if name not in ids]:
            file.write((json_line({**answer(name), "by": BY}) + "\n").encode())
            file.flush()
            ids.add(name)


def peak_mib() -> float:
    """Return the peak of this process's resident memory (Linux). getrusage would count its parent's before exec."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


WAYS = {"im2json": ours, "in memory": in_memory}


def measured(way: str, names: Path, out: Path) -> tuple[float, float]:
    """Return the seconds and the peak of the resident memory in MiB of a job in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--way", way, str(names), str(out)], capture_output=True, text=True, check=True
    )
    seconds, peak = map(float, done.stdout.split())
    return seconds, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pictures", type=int, default=1_000_000)
    parser.add_argument("--way", nargs=3, help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args()
    if options.way:
        way, names, out = options.way
        start = time.perf_counter()
        WAYS[way](Path(names), Path(out))
        print(time.perf_counter() - start, peak_mib())
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        one, names = folder / "one", folder / "names"
        one.write_text("a.png\n")
        paths = (
            f"/archive/scans/{i // 1000:04}/receipt-{i * 7919 % options.pictures:07}.png"
            for i in range(options.pictures)
        )
        names.write_text("\n".join(paths))
        found: dict[str, list[tuple[float, float]]] = {}
        for way in WAYS:
            _, base = measured(way, one, folder / f"{way} one")
            out = folder / way
            found[way] = []
            for _ in range(2):
                seconds, peak = measured(way, names, out)
                found[way].append((seconds, peak - base))
                lines = out.read_bytes().splitlines(keepends=True)
                assert len(lines) == options.pictures
                out.write_bytes(b"".join(lines[: len(lines) // 2]))
                del lines
        print(f"{options.pictures:,} pictures    im2json                 in memory              ratios")
        for job, (mine, theirs) in zip(("from the beginning", "from the middle"), zip(*found.values())):
            print(
                f"{job:20} {mine[0]:6.1f} s, {mine[1]:6.1f} MiB    {theirs[0]:6.1f} s, {theirs[1]:6.1f} MiB    "
                f"{mine[0] / theirs[0]:.2f}, {mine[1] / theirs[1]:.3f}"
            )


if __name__ == "__main__":
    main()
