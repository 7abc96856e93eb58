"""Run the walkthroughs: every command and Python block in order, every output and picture made by them.

python docs/build.py docs/first-fine-tune.md           writes what the blocks print below them, and the pictures
python docs/build.py --check docs/first-fine-tune.md   runs them and says where the walkthrough is no longer true

A ```sh or ```python block is run, and the ```text block that follows holds what it printed on stdout. Commands see a
folder that looks like the repository's root, with a runs/ of its own; the Python blocks of a walkthrough share one
namespace, and their asserts hold what the prose claims. ```sh gpu is not run. The output's fence says how much of it is
the same on any machine:

    ```text            all of it
    ```text measured   all but the numbers: scores, losses, times
    ```text varies     the first word of each paragraph: the rest are words that a model wrote, or an order that noise
                       decides

A comment above a picture says what it is made of: from what runs left for TensorBoard, or the n-th plot of a page.

    <!-- curves runs/a runs/b: train/loss log -->
    <!-- image runs/a: pictures/test_after/0 -->
    <!-- plot runs/sweep/report.html: 1 -->
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import io
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs" / "pictures"
FENCE = "```"
SAMENESS = ("", "measured", "varies")
NUMBER = re.compile(r"[-+]?\d[\d,]*\.?\d*(e[-+]?\d+)?")
VERDICT = re.compile(r"\b(better|worse|same)$")  # it follows from the numbers
PAPER = '<svg xmlns="http://www.w3.org/2000/svg" style="background: #fff; color: #1d232b; font-family: sans-serif" '
"""What a plot needs to be a file of its own; its ink is that of a page."""


@dataclass(frozen=True)
class Block:
    """A block that is run, and where its output stands. Lines are counted from 0."""

    kind: str  # sh or python
    code: str
    line: int  # of its first line of code
    end: int  # of the line behind its closing fence
    output: range | None  # the lines of the output, between its fences; None where no ```text follows
    sameness: str = ""  # how much of the output is the same on any machine: one of SAMENESS


@dataclass(frozen=True)
class Picture:
    """What a picture is made of."""

    kind: str  # curves, image or plot
    sources: list[str]  # run folders, or a page
    part: str  # a tag, or the place of the plot in the page
    log: bool  # the scale of curves
    file: str  # below docs/


def parse_blocks(lines: Sequence[str], name: str) -> list[Block]:
    """The blocks to run.

    Raises:
        ValueError: naming the line of a fence that is never closed, or of an output's that says what it cannot say.
    """
    fences, opened = [], None
    for number, line in enumerate(lines):
        if not line.startswith(FENCE):
            continue
        if opened is None:
            opened = number
        else:
            fences.append((lines[opened].removeprefix(FENCE).split(), opened, number))
            opened = None
    if opened is not None:
        raise ValueError(f"{name}:{opened + 1}: this block is never closed")
    blocks = []
    for (info, start, end), (following, first, last) in zip(fences, [*fences[1:], ([], -1, -1)]):
        if info not in (["sh"], ["python"]):
            continue
        sameness = " ".join(following[1:])
        has_output = following[:1] == ["text"] and not any(line.strip() for line in lines[end + 1 : first])
        if has_output and sameness not in SAMENESS:
            raise ValueError(
                f"{name}:{first + 1}: an output is {FENCE}text, or that and one of {', '.join(SAMENESS[1:])}"
            )
        blocks.append(
            Block(
                info[0], "\n".join(lines[start + 1 : end]), start + 1, end + 1,
                range(first + 1, last) if has_output else None, sameness if has_output else "",
            )
        )  # fmt: skip
    return blocks


def parse_pictures(text: str) -> list[Picture]:
    found = re.findall(r"<!-- (curves|image|plot) ([^:]+): (\S+)( log)? -->\n!\[[^]]*\]\(([^)]+)\)", text)
    return [Picture(kind, sources.split(), part, bool(log), file) for kind, sources, part, log, file in found]


def masked(line: str) -> str:
    """A line without numbers and their signs, what a table concludes from them, and so the width of columns."""
    return VERDICT.sub("?", re.sub(r"-{2,}", "--", " ".join(NUMBER.sub("#", line).split())))


def compared(lines: Sequence[str], sameness: str) -> dict[int, str]:
    """What is the same on any machine, by the place of its line."""
    if sameness == "varies":
        pairs = enumerate(zip(["", *lines], lines))
        return {i: masked(line.split()[0]) for i, (above, line) in pairs if line.strip() and not above.strip()}
    return {i: masked(line) if sameness == "measured" else line for i, line in enumerate(lines)}


class Bench:
    """Where the blocks of one walkthrough are run.

    Args:
        folder: is made to look like the repository's root. What a command printed is kept there, so that in a folder
            that is used again it is not run again, as long as it and all commands before it are the same. One that is
            not the same finds what the old one left there: what is committed begins in an empty folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.kept = self.folder / ".printed"
        self.kept.mkdir(parents=True, exist_ok=True)
        for path in ROOT.iterdir():
            if path.name not in ("runs", ".git") and not (self.folder / path.name).exists():
                (self.folder / path.name).symlink_to(path)
        self.namespace: dict[str, object] = {"__name__": "__main__"}
        self.so_far = hashlib.sha256()

    def run(self, block: Block) -> str:
        """What a block prints.

        Raises:
            ValueError: if it fails, with the end of what it said.
        """
        return (self._sh if block.kind == "sh" else self._python)(block.code)

    def _sh(self, code: str) -> str:
        self.so_far.update(f"{code}\0".encode())
        kept = self.kept / self.so_far.hexdigest()[:16]
        if not kept.exists():
            paths = {"PATH": Path(sys.executable).parent, "PYTHONPATH": ROOT}
            known = {name: f"{path}{os.pathsep}{os.environ.get(name, '')}" for name, path in paths.items()}
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", code], cwd=self.folder, env={**os.environ, **known},
                capture_output=True, text=True,
            )  # fmt: skip
            if done.returncode:
                raise ValueError(f"ends with {done.returncode}: {done.stderr.strip()[-2000:]}")
            kept.write_text(done.stdout, "utf-8")
        return kept.read_text("utf-8")

    def _python(self, code: str) -> str:
        printed = io.StringIO()
        try:
            with contextlib.chdir(self.folder), contextlib.redirect_stdout(printed):
                exec(compile(code, "<block>", "exec"), self.namespace)
        except Exception as error:  # whatever it is, it is the block's
            where = traceback.extract_tb(error.__traceback__)
            line = next((frame.lineno for frame in reversed(where) if frame.filename == "<block>"), 1)
            raise ValueError(f"its line {line}: {type(error).__name__}: {error}") from error
        return printed.getvalue()

    def draw(self, picture: Picture) -> bytes:
        """The file's content."""
        made = {"curves": self._curves, "image": self._image, "plot": self._plot}[picture.kind]
        return made([self.folder / source for source in picture.sources], picture)

    def _curves(self, runs: list[Path], picture: Picture) -> bytes:
        from im2json.report.plot import Curve, curve_plot

        curves = []
        for style, run in enumerate(runs):
            points = [(event.step, event.value) for event in _events(run).Scalars(picture.part)]
            curves.append(Curve(run.name, style, points))
        return _file_of(curve_plot(curves, "step", picture.part, picture.log))

    def _image(self, runs: list[Path], picture: Picture) -> bytes:
        (event, *_) = _events(runs[0]).Images(picture.part)
        image = Image.open(io.BytesIO(event.encoded_image_string)).convert("RGB")
        stream = io.BytesIO()
        image.quantize(64).save(stream, "PNG", optimize=True)
        return stream.getvalue()

    def _plot(self, pages: list[Path], picture: Picture) -> bytes:
        plots = re.findall(r"<svg viewBox.*?</svg>", pages[0].read_text("utf-8"))
        return _file_of(plots[int(picture.part) - 1])


def _file_of(plot: str) -> bytes:
    return plot.replace("<svg ", PAPER, 1).encode()


def _events(run: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tb"), size_guidance={"scalars": 0, "images": 0})
    return events.Reload()


def differences(path: Path, lines: Sequence[str], block: Block, printed: str) -> Iterator[str]:
    """Where what a block printed is not what stands below it, as FILE:LINE and what differs."""
    if block.output is None:
        yield f"{path}:{block.line}: no ```text block below"
        return
    here, now = [lines[i] for i in block.output], printed.splitlines()
    old, new = compared(here, block.sameness), compared(now, block.sameness)
    places = [*old, len(here)]
    matcher = difflib.SequenceMatcher(None, list(old.values()), list(new.values()), autojunk=False)
    for change, first, last, low, high in matcher.get_opcodes():
        if change != "equal":
            told = [f"    - {here[i]}" for i in places[first:last]] + [f"    + {now[i]}" for i in list(new)[low:high]]
            yield "\n".join([f"{path}:{block.output.start + places[first] + 1}: printed now is", *told])


def written(lines: Sequence[str], printed: Sequence[tuple[Block, str]]) -> str:
    """The walkthrough with what its blocks printed."""
    changed = list(lines)
    for block, text in reversed(printed):
        if block.output is None:
            changed[block.end : block.end] = ["", f"{FENCE}text", *text.splitlines(), FENCE]
        else:
            changed[block.output.start : block.output.stop] = text.splitlines()
    return "\n".join(changed) + "\n"


def build(path: Path, bench: Bench, check: bool) -> list[str]:
    """Run a walkthrough and write it anew, or with `check` only compare; what is wrong with it.

    Raises:
        ValueError: if a block fails, or is never closed.
    """
    text = path.read_text("utf-8")
    lines = text.splitlines()
    printed: list[tuple[Block, str]] = []
    wrong: list[str] = []
    for block in parse_blocks(lines, str(path)):
        click.echo(f"{path}:{block.line}: {block.code.splitlines()[0]}", err=True)
        try:
            printed.append((block, bench.run(block)))
        except ValueError as error:
            raise ValueError(f"{path}:{block.line + 1}: {error}") from error
        if check:
            wrong += differences(path, lines, *printed[-1])
    for picture in parse_pictures(text):
        content, file = bench.draw(picture), path.parent / picture.file
        if not check:
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(content)
        elif not file.exists():
            wrong.append(f"{path}: {picture.file} is missing")
    if not check:
        path.write_text(written(lines, printed), "utf-8")
    return wrong


@click.command()
@click.argument("walkthroughs", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--check", is_flag=True, help="change nothing; say where what is printed is not what stands there")
@click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=Path),
    help="run in this folder and keep it, to build again sooner",
)
def main(walkthroughs: tuple[Path, ...], check: bool, work: Path | None) -> None:
    """Run the blocks of WALKTHROUGHS in order and write what they print into them."""
    wrong: list[str] = []
    try:
        for path in walkthroughs:
            with contextlib.nullcontext(work) if work else tempfile.TemporaryDirectory() as folder:
                wrong += build(path.absolute(), Bench(Path(folder)), check)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    for line in wrong:
        click.echo(line)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
