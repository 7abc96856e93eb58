"""Serve a trained run over HTTP."""

from __future__ import annotations

import contextlib
import socket
from importlib.util import find_spec
from typing import Any

import click

from im2json.cli import quick_start, quiet_libraries
from im2json.errors import UserError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Addresses that other machines cannot reach."""


def serve(
    run: str, host: str, port: int, token: str | None, megabytes: float, most: int, options: dict[str, Any]
) -> None:
    """Serve until the process gets SIGINT or SIGTERM, then answer the requests that were accepted and return.

    The port is open while the model loads, so that the first clients wait instead of being refused.

    Args:
        run: a run folder, an adapter folder, or an adapter on the hub.
        host, port: where to listen. Port 0 takes a free one.
        token: the secret that clients must send, or None to require none.
        megabytes: size limit of a picture file, in 10^6 bytes.
        most: limit on the requests that the server works on at the same time.
        options: options that replace those of the run.

    Raises:
        UserError: if a package is missing, the port is taken, or the run does not load.
    """
    if missing := [name for name in ("starlette", "uvicorn") if find_spec(name) is None]:
        raise UserError(f"serve needs {' and '.join(missing)}: pip install 'im2json[serve]'")
    quiet_libraries()
    from im2json.model.hub import adapter_path
    from im2json.resume import reading_config

    config = reading_config(adapter_path(run), options)
    with _listening(host, port) as listening:
        with quick_start():
            import uvicorn

            from im2json.commands.extract import load_extractor
            from im2json.inference.serve import Service, SlotReader

            def stop() -> None:
                server.should_exit = True

            reader = SlotReader(lambda: load_extractor(config), stop)
        service = Service(reader, megabytes, most, token, LOOPBACK if host in LOOPBACK else None)
        server = uvicorn.Server(uvicorn.Config(service.application(), log_level="warning", access_log=False, ws="none"))
        name = f"[{host}]" if ":" in host else host
        click.echo(f"serving {run} at http://{name}:{listening.getsockname()[1]}", err=True)
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again after a graceful stop
            server.run([listening])
        if reader.failure is not None:
            raise reader.failure


def _listening(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (while")[0]  # which would name the address once more
        raise UserError(f"cannot listen at --host {host}, --port {port}: {reason}") from None
