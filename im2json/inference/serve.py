"""Serve an extractor over HTTP: an ASGI application whose requests share the slots of one decoder."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import itertools
import queue
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.resources import files
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from im2json import __version__
from im2json.data.pictures import NotReadable, TooManyPixels
from im2json.errors import UserError
from im2json.files import json_line
from im2json.inference import decode
from im2json.inference.extract import Extractor, Loaded, Row

SECONDS = 30.0
"""Limit on the time that a picture takes to arrive, in seconds."""
DECODING = 2  # pictures decoded at the same time. A large one takes 400 MB while it is decoded
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class _Job(NamedTuple):
    """A picture and its future row."""

    loaded: Loaded
    row: Future[Row]


class SlotReader:
    """Read pictures for many callers on one thread. A new picture takes a free slot while other answers are written.

    Args:
        load: returns the extractor. It is called on that thread, because PyTorch starts a pool of CPU threads for each
            thread that computes, and two pools on the same cores cost a third of the speed.
        on_failure: called on that thread if an exception has ended its work.

    Raises:
        UserError: what `load` raises.
    """

    def __init__(self, load: Callable[[], Extractor], on_failure: Callable[[], None]) -> None:
        self._thread = ThreadPoolExecutor(1, "im2json-slots")
        self.extractor = self._thread.submit(load).result()
        self.failure: BaseException | None = None
        self._on_failure = on_failure
        self._waiting: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()  # None ends it
        self._thread.submit(self._run)

    def submit(self, loaded: Loaded) -> Future[Row]:
        """Queue a picture and return its future row. The future gets the exception if one has ended this reader."""
        job = _Job(loaded, Future())
        self._waiting.put(job)
        if self.failure is not None:  # the thread no longer looks into the queue
            self._refuse_waiting(self.failure)
        return job.row

    def close(self) -> None:
        """Wait until all submitted pictures are read, and end the thread."""
        self._waiting.put(None)
        self._thread.shutdown()

    def _run(self) -> None:
        extractor = self.extractor
        limit = extractor.settings.max_new_tokens
        assert isinstance(limit, int)
        arrived = _Arrived(self._waiting, limit, extractor.draft)
        try:
            while arrived.wait():
                for number, answer in extractor.decoder.answers(arrived, limit, len(extractor.draft)):
                    row = extractor.row(arrived.taken[number].loaded, answer)
                    arrived.taken.pop(number).row.set_result(row)
        except BaseException as error:
            self.failure = error
            for job in arrived.taken.values():
                job.row.set_exception(error)
            self._refuse_waiting(error)
            self._on_failure()

    def _refuse_waiting(self, error: BaseException) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                if (job := self._waiting.get_nowait()) is not None and job.row.set_running_or_notify_cancel():
                    job.row.set_exception(error)


class _Arrived:
    """Iterate over the waiting pictures. Iteration stops when none waits, and continues after more have arrived."""

    def __init__(self, waiting: queue.SimpleQueue[_Job | None], limit: int, draft: Sequence[int]) -> None:
        self.taken: dict[int, _Job] = {}  # by the request's number in the present call of Decoder.answers
        self._waiting = waiting
        self._limit, self._draft = limit, draft
        self._numbers = itertools.count()
        self._next: _Job | None = None
        self._closed = False

    def wait(self) -> bool:
        """Wait for the next picture. Return False if there will be none because the reader was closed."""
        if not self._closed:
            self._numbers = itertools.count()
            self._next = self._waiting.get()
        return self._next is not None

    def __iter__(self) -> Iterator[decode.Request]:
        return self

    def __next__(self) -> decode.Request:
        while True:
            job, self._next = self._next, None
            if job is None:
                job = self._present()
            if job.row.set_running_or_notify_cancel():
                break
        picture = job.loaded.picture
        assert picture is not None
        self.taken[next(self._numbers)] = job
        return decode.Request(lambda: picture, self._limit, self._draft)

    def _present(self) -> _Job:
        try:
            job = None if self._closed else self._waiting.get_nowait()
        except queue.Empty:
            raise StopIteration from None
        if job is None:
            self._closed = True
            raise StopIteration
        return job


class Service:
    """Answer requests over HTTP. Every mistake of a client gets a status and a reason.

    Args:
        megabytes: size limit of a picture file, in 10^6 bytes.
        most: limit on the requests that are worked on at the same time. Others are refused.
        token: the secret that clients must send, or None to require none.
        hosts: names that the Host header of a request may have, or None for any. With the names of loopback alone,
            another site's page cannot have a picture read through a host name of its own (DNS rebinding).
    """

    def __init__(
        self, reader: SlotReader, megabytes: float, most: int, token: str | None, hosts: Sequence[str] | None
    ) -> None:
        self.reader = reader
        self.megabytes = megabytes
        self.most = most
        self.token = token
        self.hosts = hosts
        self.under_way = 0
        self.page = files("im2json.inference").joinpath("serve.html").read_text(encoding="utf-8")
        self.pool = ThreadPoolExecutor(DECODING, "im2json-pictures")

    def application(self) -> Starlette:
        """Return the ASGI application."""
        application = Starlette(
            routes=[
                Route("/", self._show_page),
                Route("/health", self._health),
                Route("/openapi.json", self._describe),
                Route("/extract", self._extract, methods=["POST"]),
            ],
            exception_handlers={HTTPException: _refusal, ClientDisconnect: _gone},
            lifespan=self._lifespan,
        )
        application.router.redirect_slashes = False  # it would send clients to whatever host they name
        return application

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await asyncio.to_thread(self.reader.close)
            self.pool.shutdown()

    async def _show_page(self, _: Request) -> Response:
        headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"}
        return HTMLResponse(self.page, headers=headers)

    async def _health(self, _: Request) -> Response:
        failed = self.reader.failure is not None
        found = {"status": "failed" if failed else "ready", "under_way": self.under_way, "most": self.most}
        return _json(found, 503 if failed else 200)

    async def _describe(self, _: Request) -> Response:
        return _json(openapi(self.megabytes, self.token is not None))

    async def _extract(self, request: Request) -> Response:
        """Read the picture in the body of a request."""
        self._check_host(request)
        self._check_token(request)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if not kind.startswith("image/") and kind != "application/octet-stream":
            said = f"is {kind}" if kind else "is missing"
            raise HTTPException(
                415, f"Content-Type {said}: send a picture file as the body, with image/jpeg or its own"
            )
        if self.under_way >= self.most:
            raise HTTPException(
                429,
                f"the server is busy with {self.most} requests, which is its limit: try again later",
                {"Retry-After": "1"},
            )
        self.under_way += 1
        try:
            data = await self._body(request)
            loaded = await asyncio.get_running_loop().run_in_executor(
                self.pool, self.reader.extractor.load, "the body", data
            )
            row = self.reader.submit(loaded)
        except TooManyPixels as error:
            raise HTTPException(413, str(error)) from None
        except NotReadable as error:
            raise HTTPException(415, str(error)) from None
        except UserError as error:
            raise HTTPException(422, str(error)) from None
        else:
            try:
                await asyncio.wait([asyncio.wrap_future(row)])
            finally:
                row.cancel()  # a picture that nobody waits for any more is not read
        finally:
            self.under_way -= 1
        if row.exception() is not None:
            raise HTTPException(503, "the server has failed and stops; its log says why")
        return _json(_answer(row.result()))

    async def _body(self, request: Request) -> bytes:
        most, data = self.megabytes * 10**6, bytearray()
        declared = request.headers.get("content-length", "")
        too_large = HTTPException(413, f"the picture is larger than {self.megabytes:g} MB, which is the limit")
        if declared.isdecimal() and int(declared) > most:
            raise too_large
        try:
            async with asyncio.timeout(SECONDS):
                async for chunk in request.stream():
                    data += chunk
                    if len(data) > most:
                        raise too_large
        except TimeoutError:
            raise HTTPException(408, f"the picture took more than {SECONDS:g} s to arrive") from None
        return bytes(data)

    def _check_host(self, request: Request) -> None:
        given = request.headers.get("host")
        if given is None or self.hosts is None:
            return
        try:
            host = urlsplit(f"//{given}").hostname
        except ValueError:
            host = None
        if host not in self.hosts:
            raise HTTPException(400, f"the Host header is {given}, and must be one of {', '.join(self.hosts)}")

    def _check_token(self, request: Request) -> None:
        if self.token is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.token.encode()):
            raise HTTPException(401, "Authorization: Bearer TOKEN is missing or wrong", {"WWW-Authenticate": "Bearer"})


def openapi(megabytes: float, token: bool) -> dict[str, Any]:
    """Return the description of the service in OpenAPI 3.1."""
    refusals = {
        "400": "The Host header is not a name of this machine, of a server that only this machine reaches.",
        "401": "The token is missing or wrong.",
        "408": f"The picture took more than {SECONDS:g} s to arrive.",
        "413": f"The picture is larger than {megabytes:g} MB, or has too many pixels.",
        "415": "The body is not a picture, or not of a supported format.",
        "422": "The picture is empty, damaged or cut short.",
        "429": "The server is busy with as many requests as it accepts; try again later.",
        "503": "The server has failed and stops.",
    }
    error = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
    answer = {
        "type": "object",
        "required": ["json", "reading", "confidence", "checks", "cut", "text"],
        "properties": {
            "json": {"description": "The object that was read, or null if the text is not JSON."},
            "reading": {"enum": ["strict", "repaired", "unreadable"]},
            "confidence": {"description": "The same object with a probability in place of each leaf, or null."},
            "checks": {
                "type": "object",
                "description": "Whether each equation of --check-sum holds, or null if that is undecided.",
            },
            "cut": {"type": "boolean", "description": "Whether --constrain completed the text at the token limit."},
            "text": {"type": "string", "description": "What the model wrote."},
            "pages": {"type": "integer", "description": "Number of pages in the file. Only the first is read."},
            "note": {"type": "string", "description": "How values of more than 8 bits were scaled."},
        },
    }

    def response(description: str, schema: Mapping[str, Any]) -> dict[str, Any]:
        return {"description": description, "content": {"application/json": {"schema": schema}}}

    picture = {"schema": {"type": "string", "format": "binary"}}
    extract: dict[str, Any] = {
        "summary": "Read a picture of a document as JSON.",
        "requestBody": {"required": True, "content": {"image/*": picture, "application/octet-stream": picture}},
        "responses": {
            "200": response("The answer.", answer),
            **{status: response(why, error) for status, why in refusals.items() if token or status != "401"},
        },
    }
    described: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "im2json", "version": __version__},
        "paths": {
            "/extract": {"post": extract},
            "/health": {
                "get": {
                    "summary": "Report whether the server works.",
                    "responses": {"200": {"description": "It does."}, "503": {"description": "It has failed."}},
                }
            },
        },
    }
    if token:
        extract["security"] = [{"token": []}]
        described["components"] = {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}}
    return described


def _answer(row: Row) -> dict[str, Any]:
    """Return the answer to a client: a row of `im2json extract` without its id, and always with checks and cut."""
    return {"checks": {}, "cut": False} | {name: value for name, value in row.items() if name != "id"}


def _json(value: dict[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json_line(value) + "\n", status, headers, "application/json")


async def _refusal(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _json({"error": error.detail}, error.status_code, error.headers)


async def _gone(_: Request, __: Exception) -> Response:
    return Response(status_code=400)  # the client has gone
