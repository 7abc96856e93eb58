"""What the scripts share: flags made from the options, and errors that a user can act on."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import click

from im2json.options import FIELDS, PRESETS, ROOMS, check, flag_name, scalar_type


def option_flags(command: Callable) -> Callable:
    """Add a flag for every option; the command gets the values given on the command line, and only those,
    as a dict named `given`."""
    for room in reversed(ROOMS.values()):
        for name in reversed([field.name for field in dataclasses.fields(room)]):
            command = _flag(name)(command)
    return command


def _flag(name: str) -> Callable:
    field = FIELDS[name]
    kind, _ = scalar_type(name)
    flag = flag_name(name)
    shown = "" if field.default is None else f"  [default: {_shown_default(name, field.default)}]"
    settings: dict[str, Any] = dict(help=field.metadata["help"] + shown, expose_value=False, callback=_collect)
    if kind is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", name, default=None, **settings)
    choices = field.metadata["choices"]
    return click.option(flag, name, type=click.Choice(choices) if choices else kind,
                        metavar=(field.metadata["unit"] or None), **settings)  # fmt: skip


def _shown_default(name: str, default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    return f"{default:g}" if isinstance(default, float) else str(default)


def _collect(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    """Keep a value that was given; one that its option refuses is a usage error at this flag."""
    given = context.ensure_object(dict)
    if value is None:
        return
    assert parameter.name is not None
    problem = check(parameter.name, value)
    if problem:
        raise click.BadParameter(problem.split(": ", 1)[1], context, parameter)
    given[parameter.name] = value


preset_flag = click.option(
    "--preset",
    type=click.Choice(list(PRESETS)),
    help="a named recipe; any flag overrides: tiny is the embedded base, cord is PaliGemma-3B on CORD v2.",
)


@contextlib.contextmanager
def user_errors(interrupted: str = "nothing was lost") -> Iterator[None]:
    """Turn an error that is the user's to mend into one clear message and exit status 1; Ctrl-C says `interrupted`.

    ValueError is how every room reports a user's mistake, OSError is the system's word on a file.
    IM2JSON_TRACEBACK=1 shows where it came from.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise click.ClickException(f"interrupted: {interrupted}") from None
    except (ValueError, OSError) as error:
        if os.environ.get("IM2JSON_TRACEBACK"):
            raise
        raise click.ClickException(str(error)) from error


def quiet_libraries() -> None:
    """Leave the terminal to what the run itself says; call it before torch and transformers are imported."""
    for name, value in {
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }.items():
        os.environ.setdefault(name, value)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # optional kernels that it looks for on a CPU
    known = ("Paged optimizers are not supported on CPU", "inner dimension", ".*gradient_checkpointing", ".*pin_memory")
    for message in known:
        warnings.filterwarnings("ignore", message=message)
