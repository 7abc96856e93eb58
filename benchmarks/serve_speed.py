"""Pictures per second of `im2json serve` with many clients, beside `im2json extract` on the same machine.

Both read the same pictures with the same run, extract first. Each client sends one request after the other on a
connection of its own. With --overload the server accepts only a quarter of the clients at a time, and a refused client
tries again after .1 s. For the server it also prints the median and the 99th percentile of the time of an answer,
the number of answers by status, and the memory of its process after a tenth of the time and at the end.

python benchmarks/serve_speed.py runs/NAME PICTURES...
"""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from itertools import cycle
from pathlib import Path

import click
import psutil


@click.command()
@click.argument("run")
@click.argument("pictures", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--clients", default=32, show_default=True, help="Clients at the same time.")
@click.option("--seconds", default=60.0, show_default=True, help="How long they send requests.")
@click.option("--overload", is_flag=True, help="Accept only a quarter of the clients at a time.")
def main(run: str, pictures: tuple[Path, ...], clients: int, seconds: float, overload: bool) -> None:
    extracted = extract_rate(run, pictures)
    print(f"extract: {extracted:.2f} pictures/s, {len(pictures)} pictures, loading not counted")
    flags = ["--max-requests", str(clients // 4 if overload else clients)]
    command = [sys.executable, "-m", "im2json", "serve", run, "--port", "0", *flags]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        said = next(line for line in server.stderr if "http://" in line)
        port = int(re.findall(r":(\d+)", said)[-1])
        served = load(port, [path.read_bytes() for path in pictures], clients, seconds, psutil.Process(server.pid))
    finally:
        server.terminate()
    print(f"serve: {served:.2f} pictures/s, {clients} clients for {seconds:g} s")
    print(f"serve / extract: {served / extracted:.2f}")


def extract_rate(run: str, pictures: tuple[Path, ...]) -> float:
    """Return the pictures per second of a job, without its start."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "im2json", "extract", run, "--out", f"{folder}/rows.jsonl"]
        times = []
        for given in (pictures[:1], pictures):  # the first shows how long the start takes
            start = time.perf_counter()
            subprocess.run([*command, *map(str, given)], check=True, stderr=subprocess.DEVNULL)
            times.append(time.perf_counter() - start)
    return (len(pictures) - 1) / (times[1] - times[0])


def load(port: int, files: list[bytes], clients: int, seconds: float, process: psutil.Process) -> float:
    """Send requests for so long, print what came of them, and return the answers per second."""
    statuses: Counter[int] = Counter()
    latencies: list[float] = []
    order, lock = cycle(files), threading.Lock()
    begin = time.perf_counter()

    def work() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        while time.perf_counter() - begin < seconds:
            with lock:
                data = next(order)
            start = time.perf_counter()
            connection.request("POST", "/extract", data, {"Content-Type": "application/octet-stream"})
            response = connection.getresponse()
            answer = json.loads(response.read())
            with lock:
                statuses[response.status] += 1
                if response.status == 200:
                    assert "json" in answer
                    latencies.append(time.perf_counter() - start)
            if response.status != 200:
                time.sleep(0.1)

    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    time.sleep(seconds / 10)
    early = process.memory_info().rss
    for thread in threads:
        thread.join()
    elapsed = time.perf_counter() - begin
    latencies.sort()
    p50, p99 = (latencies[int(len(latencies) * part)] for part in (0.5, 0.99))
    print(f"answers by status: {dict(sorted(statuses.items()))}; p50 {p50:.2f} s, p99 {p99:.2f} s")
    late = process.memory_info().rss
    print(f"memory: {early / 2**20:.0f} MiB after {seconds / 10:g} s, {late / 2**20:.0f} MiB at the end")
    return statuses[200] / elapsed


if __name__ == "__main__":
    main()
