"""Pictures over HTTP: the answers of extract, a status and a reason for every mistake, and nobody left waiting."""

from __future__ import annotations

import contextlib
import http.client
import json
import queue
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import pytest
import uvicorn
from forks import Process
from helpers import clear_error, wait_for
from PIL import Image

from im2json.commands.serve import LOOPBACK
from im2json.inference import serve
from im2json.inference.extract import Extractor
from im2json.inference.serve import Service, SlotReader
from im2json.inference.slots import Slots

PNG = {"Content-Type": "image/png"}


class Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """Sends requests to a server on this machine, each on a connection of its own."""

    def __init__(self, port: int) -> None:
        self.port = port

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] = PNG) -> Answer:
        """Send a request. A body that is iterated over is sent in chunks."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())

    def post(self, data: Any, **headers: str) -> Answer:
        return self.ask(
            "POST", "/extract", data, PNG | {name.replace("_", "-"): value for name, value in headers.items()}
        )

    def send(self, data: bytes) -> bytes:
        """Send bytes as they are, and return what the server says until it closes the connection."""
        with socket.create_connection(("127.0.0.1", self.port), 60) as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: connection.recv(4096), b""))


class Server(Client):
    """A service that listens on a free port, in a thread of this process."""

    def __init__(self, extractor: Extractor, **settings: Any) -> None:
        chosen = {"megabytes": 1.0, "most": 64, "token": None, "hosts": LOOPBACK} | settings
        self.failed = threading.Event()
        self.reader = SlotReader(lambda: extractor, self.failed.set)
        self.service = Service(self.reader, **chosen)  # type: ignore[arg-type]
        listening = socket.create_server(("127.0.0.1", 0))
        super().__init__(listening.getsockname()[1])
        self.server = uvicorn.Server(uvicorn.Config(self.service.application(), log_level="warning", access_log=False))
        self.thread = threading.Thread(target=self.server.run, args=[[listening]])
        self.thread.start()

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive()


@contextlib.contextmanager
def served(extractor: Extractor, **settings: Any) -> Iterator[Server]:
    server = Server(extractor, **settings)
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def extractor(finished) -> Extractor:
    """An extractor whose answers are JSON."""
    return Extractor.from_run(finished.path, constrain=True, eval_batch_size=4)


@pytest.fixture(scope="module")
def files(dataset) -> list[bytes]:
    return [Path(f"{dataset}/train/{i}.png").read_bytes() for i in range(10)]


@pytest.fixture(scope="module")
def expected(extractor, dataset) -> list[dict[str, Any]]:
    rows = list(extractor(f"{dataset}/train/{i}.png" for i in range(10)))
    assert all(row["confidence"] for row in rows)
    return rows


@pytest.fixture(scope="module")
def server(extractor) -> Iterator[Server]:
    with served(extractor) as server:
        yield server


def assert_answers(answer: Answer, row: dict[str, Any]) -> None:
    """Check that a response is a row of extract. Probabilities may differ as they do with other texts beside one."""
    assert answer.status == 200, answer
    found = answer.json
    assert {name: found[name] for name in ("json", "text", "reading", "cut")} == {
        "cut": False, **{name: row[name] for name in ("json", "text", "reading", *(["cut"] if "cut" in row else []))},
    }  # fmt: skip
    one, other = ([*leaves(value)] for value in (found["confidence"], row["confidence"]))
    assert one == pytest.approx(other, abs=1e-4)


def leaves(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from leaves(part)
    else:
        yield value


# --- answers


def test_answers_are_those_of_extract(server, files, expected):
    for data, row in zip(files[:2], expected):
        assert_answers(server.post(data), row)


def test_requests_at_once_share_the_slots(server, files, expected):
    """Each gets its own answer, in fewer passes than one after the other."""
    decoder, passes = server.reader.extractor.decoder, []
    for threads in (1, 10):
        before = decoder.passes
        with ThreadPoolExecutor(threads) as pool:
            for answer, row in zip(pool.map(server.post, files), expected, strict=True):
                assert_answers(answer, row)
        passes.append(decoder.passes - before)
    assert passes[1] < passes[0]


def test_what_a_row_says_beside_its_answer(server, files):
    pages = BytesIO()
    first = Image.open(BytesIO(files[0]))
    first.save(pages, "TIFF", save_all=True, append_images=[first])
    assert server.post(pages.getvalue(), Content_Type="image/tiff").json["pages"] == 2
    assert server.post(files[0]).json["checks"] == {}
    deep = BytesIO()
    Image.new("I;16", (40, 40), 900).save(deep, "PNG")
    assert server.post(deep.getvalue()).json["note"] == "its values go up to 900, and 1023 is taken for white"


def test_any_picture_type_and_none_in_particular(server, files, expected):
    for kind in ("image/jpeg", "application/octet-stream", "IMAGE/PNG; q=1"):
        assert_answers(server.post(files[0], Content_Type=kind), expected[0])
    assert_answers(server.post(iter([files[0][:100], files[0][100:]])), expected[0])


def test_the_description_is_of_what_is_answered(server, extractor, files):
    described = server.ask("GET", "/openapi.json").json
    assert described["openapi"].startswith("3.1")
    responses = described["paths"]["/extract"]["post"]["responses"]

    def check(answer: Answer) -> None:
        schema = responses[str(answer.status)]["content"]["application/json"]["schema"]
        jsonschema.validate(answer.json, schema)

    check(server.post(files[0]))
    check(server.post(b"no picture"))
    check(server.post(files[0][:100]))
    assert "401" not in responses and "components" not in described
    with served(extractor, token="secret") as closed:
        described = closed.ask("GET", "/openapi.json").json
        assert "401" in described["paths"]["/extract"]["post"]["responses"]
        assert described["components"]["securitySchemes"]["token"] == {"type": "http", "scheme": "bearer"}


def test_the_page_names_what_the_server_has(server):
    """It loads nothing from elsewhere, and its parts exist."""
    answer = server.ask("GET", "/")
    page = answer.body.decode()
    assert (answer.status, answer.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert not re.search(r"https?://", page)
    used = set(re.findall(r'find\("(\w+)"\)', page))
    assert used and used <= set(re.findall(r'id="(\w+)"', page))


# --- mistakes of clients


def too_many_pixels() -> bytes:
    image = BytesIO()
    Image.new("1", (20_000, 20_000)).save(image, "PNG")
    return image.getvalue()


class Mistake(NamedTuple):
    """A request, and the status and a part of the reason that it gets."""

    status: int
    says: str
    body: Any = b""
    headers: dict[str, str] = PNG
    method: str = "POST"
    path: str = "/extract"


HEADER = b"\x89PNG\r\n\x1a\n"
MISTAKES = {
    "no body": Mistake(422, "the picture is empty (0 bytes)"),
    "text": Mistake(415, "the body: is not a picture that can be read", b"total 9.30"),
    "a PDF": Mistake(415, "PDF", b"%PDF-1.7\n%\xe2\xe3\n1 0 obj\n"),
    "HTML": Mistake(415, "is not a picture", b"<!doctype html><script>alert(1)</script>"),
    "a header alone": Mistake(422, "damaged or cut short", HEADER),
    "noise behind a header": Mistake(422, "damaged or cut short", b"\xff\xd8\xff" + bytes(range(256)) * 40),
    "no type": Mistake(415, "Content-Type is missing", b"x", {}),
    "a form": Mistake(415, "Content-Type is multipart/form-data: send a picture file as the body", b"x",
                      {"Content-Type": "multipart/form-data; boundary=x"}),
    "JSON": Mistake(415, "Content-Type is application/json", b'{"path": "/etc/passwd"}',
                    {"Content-Type": "application/json"}),
    "too large": Mistake(413, "larger than 1 MB", b"x" * 1_000_001),
    "too large, in chunks": Mistake(413, "larger than 1 MB", [b"x" * 100_000] * 30),
    "too large, it says": Mistake(413, "larger than 1 MB", b"", PNG | {"Content-Length": "1" + "0" * 18}),
    "too many pixels": Mistake(413, "too many pixels", too_many_pixels()),
    "another method": Mistake(405, "Method Not Allowed", method="GET"),
    "a method to delete with": Mistake(405, "Method Not Allowed", method="DELETE"),
    "an unknown path": Mistake(404, "Not Found", path="/extract/more"),
    "a path of the machine": Mistake(404, "Not Found", method="GET", path="/../../../etc/passwd"),
    "the same, encoded": Mistake(404, "Not Found", method="GET", path="/%2e%2e/%2e%2e/etc/passwd"),
    "a file of the package": Mistake(404, "Not Found", method="GET", path="/serve.html"),
    "another's name for this machine": Mistake(
        400, "the Host header is attacker.example", b"x", PNG | {"Host": "attacker.example"}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_its_status_and_a_reason(server, files, expected, caplog, name):
    mistake = MISTAKES[name]
    try:
        answer = server.ask(mistake.method, mistake.path, iter(mistake.body) if isinstance(mistake.body, list)
                            else mistake.body, mistake.headers)  # fmt: skip
    except (BrokenPipeError, ConnectionResetError):
        assert "chunks" in name  # the server has answered and closed before all was sent
    else:
        assert answer.status == mistake.status, answer
        assert mistake.says in answer.body.decode()
        assert set(answer.json) == {"error"}
    assert_still_serving(server, files, expected)
    assert "Traceback" not in caplog.text


def assert_still_serving(server: Server, files: list[bytes], expected: list[dict[str, Any]]) -> None:
    assert_answers(server.post(files[0]), expected[0])
    wait_for(lambda: server.ask("GET", "/health").json == {"status": "ready", "under_way": 0, "most": 64}, seconds=20)


@pytest.mark.parametrize(
    "data",
    [
        b"hello\r\n\r\n",
        b"POST /extract HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /extract HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 200_000 + b"\r\n\r\n",
        b"POST /extract HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: 500\r\n\r\n" + HEADER,
        b"",
    ],
    ids=["no HTTP", "a negative length", "bad chunks", "a huge header", "gone within the body", "nothing"],
)
def test_what_is_no_request(server, files, expected, data):
    with contextlib.suppress(OSError):  # the server has closed the connection
        assert not server.send(data).startswith(b"HTTP/1.1 5")
    assert_still_serving(server, files, expected)


def test_a_client_that_leaves_before_its_answer(server, files, expected):
    head = "POST /extract HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: "
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(f"{head}{len(files[1])}\r\n\r\n".encode() + files[1])
    assert_still_serving(server, files, expected)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1", "[::1]", "[::1]:8000"])
def test_names_of_this_machine(server, files, expected, host):
    assert_answers(server.post(files[0], Host=host), expected[0])


def test_a_host_that_is_none(server):
    for host in ("[::1", "attacker.example:8000", "127.0.0.1.attacker.example", ""):
        assert server.post(b"x", Host=host).status == 400, host


def test_a_body_that_takes_too_long(server, files, expected, monkeypatch):
    monkeypatch.setattr(serve, "SECONDS", 0.2)
    going = threading.Event()

    def body() -> Iterator[bytes]:
        yield files[0][:10]
        going.wait(20)
        yield files[0][10:]

    threading.Timer(1, going.set).start()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        answer = server.post(body())
        assert (answer.status, answer.json) == (408, {"error": "the picture took more than 0.2 s to arrive"})
    monkeypatch.undo()
    assert_still_serving(server, files, expected)


@pytest.mark.parametrize(
    "given", [None, "Bearer", "Bearer wrong", "Bearer secret more", "Basic secret", "secret", "Bearer s\xe9cret"]
)
def test_a_token(extractor, files, expected, given):
    with served(extractor, token="secret", hosts=None) as server:
        headers = PNG | ({} if given is None else {"Authorization": given})
        answer = server.ask("POST", "/extract", files[0], headers)
        assert answer.status == 401
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert "secret" not in answer.body.decode()
        assert_answers(server.post(files[0], Authorization="Bearer secret"), expected[0])
        assert server.ask("GET", "/health").status == server.ask("GET", "/").status == 200


# --- more than can be read, failures and stops


@pytest.fixture
def held_up(monkeypatch) -> Callable[[], None]:
    """Have passes wait until this is called."""
    going = threading.Event()
    advance = Slots.advance
    monkeypatch.setattr(Slots, "advance", lambda *given: (going.wait(60), advance(*given))[1])
    return going.set


def test_more_requests_than_are_accepted(extractor, files, expected, held_up):
    with served(extractor, most=3) as server, ThreadPoolExecutor(3) as pool:
        accepted = [pool.submit(server.post, data) for data in files[:3]]
        wait_for(lambda: server.ask("GET", "/health").json["under_way"] == 3)
        refused = server.post(files[3])
        assert (refused.status, refused.headers["Retry-After"]) == (429, "1")
        assert refused.json == {"error": "the server is busy with 3 requests, which is its limit: try again later"}
        held_up()
        for future, row in zip(accepted, expected):
            assert_answers(future.result(), row)
        assert_answers(server.post(files[3]), expected[3])


def test_a_stop_answers_what_was_accepted(extractor, files, expected, held_up):
    with ThreadPoolExecutor(6) as pool:
        with served(extractor) as server:
            accepted = [pool.submit(server.post, data) for data in files[:6]]  # more than there are slots
            wait_for(lambda: server.ask("GET", "/health").json["under_way"] == 6)
            server.server.should_exit = True
            time.sleep(0.2)  # it no longer listens
            held_up()
        for future, row in zip(accepted, expected):
            assert_answers(future.result(), row)
    with pytest.raises(ConnectionRefusedError):
        server.post(files[0])


@pytest.mark.parametrize("broken", [(Slots, "advance"), (Extractor, "row")], ids=["in a pass", "in scoring"])
def test_a_bug_of_ours_answers_everyone_and_ends(extractor, files, monkeypatch, broken):
    """Those that are read, those that wait, and those that come afterwards."""
    going: queue.SimpleQueue[None] = queue.SimpleQueue()

    def fail(*_: Any) -> None:
        going.get(timeout=60)
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(*broken, fail)
    with ThreadPoolExecutor(6) as pool, served(extractor) as server:
        sent = [pool.submit(server.post, data) for data in files[:6]]
        wait_for(lambda: server.ask("GET", "/health").json["under_way"] == 6)
        going.put(None)
        for future in sent:
            assert future.result().status == 503
            assert "the server has failed and stops; its log says why" in future.result().json["error"]
        assert server.failed.wait(20)
        assert server.post(files[0]).status == 503
        health = server.ask("GET", "/health")
        assert (health.status, health.json["status"]) == (503, "failed")
        assert isinstance(server.reader.failure, ZeroDivisionError)


# --- the command

SERVE = """
import sys
from im2json.app import main
main(sys.argv[1:])
"""


def started(program: str, run: Path, *flags: str) -> tuple[Process, Client]:
    """Start the command in a process of its own, and return a client of it once it serves."""
    process = Process(program, "serve", str(run), "--port", "0", *flags)
    said = ""
    while f"serving {run} at http://127.0.0.1:" not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    return process, Client(int(said.rpartition(":")[2]))


def test_the_command_serves_until_it_is_stopped(finished, files, expected):
    process, client = started(SERVE, finished.path, "--constrain")
    assert_answers(client.post(files[0]), expected[0])
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=60)
    assert process.returncode == 0, printed
    assert "Traceback" not in "".join(printed)


def test_a_failure_ends_the_command_with_its_traceback(finished, files):
    broken = "from im2json.inference.slots import Slots\nSlots.advance = lambda *_: 1 / 0\n"
    process, client = started(broken + SERVE, finished.path)
    assert client.post(files[0]).status == 503
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "ZeroDivisionError" in said


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 lets other machines in: set --token, or IM2JSON_TOKEN"),
        (["--token", "two words"], "--token: expected ASCII characters without spaces"),
        (["--token", ""], "--token: expected"),
        (["--max-megabytes", "0"], "--max-megabytes"),
        (["--max-requests", "0"], "--max-requests"),
        (["--port", "70000"], "--port"),
    ],
)
def test_a_wrong_option(cli, finished, flags, says):
    result = cli("im2json.__main__", "serve", finished.path, *flags)
    assert result.exit_code == 2
    assert says in result.stderr


def test_what_keeps_it_from_starting(cli, finished, tmp_path, monkeypatch):
    def serve(*given: object, run: object = finished.path) -> str:
        return clear_error(cli("im2json.__main__", "serve", run, *given))

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen at --host 127.0.0.1, --port {port}: Address already in use" in serve("--port", port)
    assert "cannot listen at --host no.such.host.invalid" in serve("--host", "no.such.host.invalid", "--token", "x")
    assert "holds no adapter" in serve("--port", 0, run=tmp_path)
    monkeypatch.setattr("im2json.commands.serve.find_spec", lambda name: None)
    assert serve() == "serve needs starlette and uvicorn: pip install 'im2json[serve]'"


def test_a_token_from_the_environment(cli, finished, monkeypatch):
    monkeypatch.setenv("IM2JSON_TOKEN", "two words")
    result = cli("im2json.__main__", "serve", finished.path, "--host", "0.0.0.0")
    assert result.exit_code == 2 and "--token: expected" in result.stderr
