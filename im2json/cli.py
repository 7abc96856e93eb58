"""Make flags from the options, and errors that a user can act on, for all commands."""

from __future__ import annotations

import contextlib
import errno
import gc
import io
import logging
import math
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from im2json.errors import UserError, WriteError, first_line
from im2json.options import GROUPS, OPTIONS, PRESETS, Option, check, flag_name, nearest
from im2json.text import command_line


def option_flags(*names: str) -> Callable[[Callable], Callable]:
    """Return a decorator that adds a flag for each of these options, or for every option if none is named.

    Options that are named replace those of a run, so their help shows no default.
    The context's `obj` holds the values that the user gave on the command line, and no others.
    """

    def add(command: Callable) -> Callable:
        for name in reversed(names or list(OPTIONS)):
            command = _flag(name, with_default=not names)(command)
        return command

    return add


class Command(click.Command):
    """A command that suggests a flag in place of one that does not exist only if their names are near."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(context, args)
        except click.NoSuchOption as error:
            flags = [flag for parameter in self.get_params(context) for flag in _long_flags(parameter)]
            found = nearest(_option_name(error.option_name), map(_option_name, flags))
            question = "" if found is None else f" Did you mean {flag_name(found)}?"
            raise click.UsageError(f"No such option {error.option_name}.{question}", context) from None


def _long_flags(parameter: click.Parameter) -> list[str]:
    return [flag for flag in (*parameter.opts, *parameter.secondary_opts) if flag.startswith("--")]


def _option_name(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


class GroupedCommand(Command):
    """List the options group by group in --help."""

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        records: dict[str, list[tuple[str, str]]] = {group: [] for group in ("run", *GROUPS)}
        for parameter in self.get_params(context):
            record = parameter.get_help_record(context)
            if record is not None:
                option = OPTIONS.get(parameter.name or "")
                records[option.group if option else "run"].append(record)
        for group, rows in records.items():
            if rows:
                with formatter.section(f"{group.capitalize()} options"):
                    formatter.write_dl(rows)


_METAVARS = {int: "N", float: "FLOAT", str: "TEXT"}


def _flag(name: str, with_default: bool) -> Callable:
    """Return a decorator that adds the flag of one option."""
    option = OPTIONS[name]
    flag = flag_name(name)
    help = option.help
    if option.choices and option.metavar:  # else click spells the choices out beside the flag
        help += f" One of {', '.join(option.choices)}."
    if option.default is not None and with_default:
        help += f"  [default: {_shown_default(option)}]"
    settings: dict[str, Any] = dict(help=help, expose_value=False, callback=_collect)
    if option.kind is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", name, default=None, **settings)
    type: Any = option.kind
    metavar = option.metavar or (None if option.choices else _METAVARS[option.kind])
    if option.choices:
        type = click.Choice(option.choices)
    elif option.word is not None:
        type, metavar = _NumberOrWord(), f"{metavar}|{option.word}"
    return click.option(flag, name, type=type, metavar=metavar, **settings)


class _NumberOrWord(click.ParamType):
    """Read a whole number if the text is one. Otherwise leave the text to `check`, which accepts only the word."""

    name = "number or word"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        try:
            return int(value)
        except ValueError:
            return value


def _shown_default(option: Option) -> str:
    if option.kind is bool:
        return "on" if option.default else "off"
    shown = f"{option.default:g}" if isinstance(option.default, float) else str(option.default)
    return shown if option.default == option.word else f"{shown} {option.unit}".rstrip()


def _collect(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    """Keep the value that the user gave for a flag.

    Raises:
        click.BadParameter: if the option does not allow the value.
    """
    given = context.ensure_object(dict)
    if value is None:
        return
    assert parameter.name is not None
    problem = check(parameter.name, value)
    if problem:
        raise click.BadParameter(problem.split(": ", 1)[1], context, parameter)
    given[parameter.name] = OPTIONS[parameter.name].coerce(value)


preset_flag = click.option(
    "--preset",
    type=click.Choice(list(PRESETS)),
    help="Named recipe, which other flags override. tiny: the default of every option, with the embedded base model. "
    "cord: PaliGemma-3B on CORD v2. qwen: Qwen3-VL-2B; qwen2.5: Qwen2.5-VL-3B; gemma3: Gemma 3 4B; smolvlm: "
    "SmolVLM2-2.2B; paddleocr: PaddleOCR-VL; docling: Granite-Docling; all on CORD v2.",
)


class Interrupted(click.ClickException):
    exit_code = 128 + signal.SIGINT  # as shells have it


@contextlib.contextmanager
def user_errors(interrupted: str = "nothing was lost") -> Iterator[None]:
    """Turn a mistake of the user into one clear message and exit status 1; leave the traceback of our own bugs.

    A UserError is a mistake of the user, an OSError of the kinds in SYSTEM_ERRORS a condition of the machine.
    IM2JSON_TRACEBACK=1 shows the traceback of these too. Ctrl-C and SIGTERM exit with 130 and print what the
    KeyboardInterrupt says, or else `interrupted`.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Names and terminals that are not UTF-8 must not end a run. Line by line, both streams keep their order in
            # one file.
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if main_thread else None
    try:
        yield
    except KeyboardInterrupt as stop:
        raise Interrupted(f"interrupted: {stop if str(stop) else interrupted}") from None
    except BrokenPipeError:  # who read the output has seen enough; click ends in silence
        raise
    except Exception as error:
        message = _message(error)
        if message is None and not isinstance(error, click.ClickException | click.exceptions.Exit):
            error.add_note(REPORT)
        if message is None or os.environ.get("IM2JSON_TRACEBACK"):
            raise
        raise click.ClickException(message) from error
    finally:
        if main_thread:
            signal.signal(signal.SIGTERM, before)


REPORT = "This is a bug in im2json. Please report it with the traceback above and the command."
SYSTEM_ERRORS = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE,
    errno.EMFILE, errno.ENFILE, errno.ENAMETOOLONG, errno.ENOMEM, errno.EAGAIN, errno.EBUSY, errno.ETIMEDOUT,
    errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP, errno.ENXIO,
}  # fmt: skip
"""Errors of the operating system that do not indicate a bug. A missing file does: the code that expects one from the
user raises a UserError."""


def _message(error: Exception) -> str | None:
    """Return the message that the user sees, or None if the error is a bug."""
    text = str(error)
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return f"{first_line(error).rstrip('.')}. {LESS_MEMORY}"
    known = isinstance(error, UserError) or (isinstance(error, OSError) and error.errno in SYSTEM_ERRORS)
    return text if known else None


@contextlib.contextmanager
def resumable(path: Path) -> Iterator[None]:
    """Add how to resume the run to what stops it: an interruption, or a system that refuses a file."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(resume_advice(path)) from None
    except (OSError, WriteError) as error:
        if not path.exists():
            raise UserError(f"{error}; {path} was removed while the run was writing to it") from error
        if isinstance(error, OSError) and error.errno not in SYSTEM_ERRORS:
            raise
        raise UserError(f"{error}; what was saved is kept: {resume_advice(path)}") from error


def resume_advice(path: Path) -> str:
    """Return the command that resumes a run."""
    return f"go on with {command_line('im2json', 'train', '--resume', path)}"


LESS_MEMORY = (
    "Less is needed with a smaller --microbatch (examples per step stay the same), --gradient-checkpointing or, while "
    "evaluating, a smaller --eval-batch-size"
)


class UserPath(click.Path):
    """Expand `~`, which a shell leaves alone in --output=~/runs."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(os.path.expanduser(value), param, ctx)


class FloatRange(click.FloatRange):
    """Refuse nan, which click accepts in every range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value} is not a number.", param, ctx)
        return number


@contextlib.contextmanager
def quick_start() -> Iterator[None]:
    """Import torch and its companions in two thirds of the time, for commands that answer quickly and never train.

    bitsandbytes has an optimizer's function compiled while it is imported, which loads all of torch's compiler (1.3 s);
    and the collector looks through a million new objects again and again for garbage that is not there (1 s).
    """
    off = "TORCHDYNAMO_DISABLE"
    before = os.environ.get(off)
    os.environ[off] = "1"
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        os.environ.pop(off) if before is None else os.environ.update({off: before})


def quiet_libraries() -> None:
    """Leave the terminal to what the run itself says, and the cores to whoever works.

    Call it before torch and transformers are imported.
    """
    for name, value in {
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        # OpenMP's threads wait for each other in a busy loop of 300,000 turns, which beside one other busy process on
        # 2 cores makes a step 7 times slower; with fewer it is 2 times, and a tenth slower without one.
        "GOMP_SPINCOUNT": "10000",
    }.items():
        os.environ.setdefault(name, value)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # optional kernels that it looks for on a CPU
    known = ("Paged optimizers are not supported on CPU", "inner dimension", ".*gradient_checkpointing", ".*pin_memory")
    for message in known:
        warnings.filterwarnings("ignore", message=message)
