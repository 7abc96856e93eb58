"""The walkthroughs: their links lead somewhere, and what stands in them is what comes out when they are run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from codeop import compile_command
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT
from PIL import Image

DOCS = ROOT / "docs"
WALKTHROUGHS = [DOCS / "ablations.md", DOCS / "first-fine-tune.md"]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(DOCS.glob("*.md")),
    *sorted((DOCS / "reference").glob("*.md")),
]
FENCED = re.compile(r"^```(.*?)$(.*?)^```$", re.MULTILINE | re.DOTALL)


def names(path: Path) -> str:
    return path.name


def prose(path: Path) -> str:
    """A page without what is fenced or inline code."""
    return re.sub(r"`[^`]*`", "", FENCED.sub("", path.read_text("utf-8")))


def anchors(path: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", path.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def shown(path: Path) -> set[str]:
    """The pictures of a page."""
    return set(re.findall(r"!\[[^]]*\]\(([^)]+)\)", path.read_text("utf-8")))


def broken(path: Path) -> Iterator[str]:
    """The relative links of a page that lead nowhere."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if re.match(r"\w+:", target):
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        if not found.exists() or (anchor and anchor not in anchors(found)):
            yield target


@pytest.mark.parametrize("path", PAGES, ids=names)
def test_relative_links_and_anchors_exist(path: Path):
    assert list(broken(path)) == []


def test_a_broken_link_is_found(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("# A heading\n[a](#a-heading) [b](#none) [c](none.md) [d](https://x.y)\n```\n[e](code.md)\n```\n")
    assert list(broken(page)) == ["#none", "none.md"]


@pytest.mark.parametrize("path", WALKTHROUGHS, ids=names)
def test_every_block_that_is_run_has_its_output(path: Path):
    from docs.build import parse_blocks

    blocks = parse_blocks(path.read_text("utf-8").splitlines(), path.name)
    assert blocks
    assert [block.line for block in blocks if block.output is None or not len(block.output)] == []


def refused(code: str) -> Iterator[str]:
    """The lines that Python's prompt refuses when the code is pasted line by line."""
    pasted: list[str] = []
    for line in [*code.splitlines(), ""]:
        pasted.append(line)
        try:
            unfinished = compile_command("\n".join(pasted), symbol="single") is None
        except SyntaxError:
            yield line
            unfinished = False
        if not unfinished:
            pasted = []


@pytest.mark.parametrize("path", WALKTHROUGHS, ids=names)
def test_every_python_block_can_be_pasted_at_the_prompt(path: Path):
    from docs.build import parse_blocks

    blocks = parse_blocks(path.read_text("utf-8").splitlines(), path.name)
    assert [line for block in blocks if block.kind == "python" for line in refused(block.code)] == []


def test_the_prompt_refuses_what_follows_an_indented_block_at_once():
    assert list(refused("for i in [1]:\n    a = i\nprint(a)\n")) == ["print(a)"]
    assert list(refused("for i in [1]:\n    a = i\n\nprint(a)\n")) == []


@pytest.mark.parametrize("path", WALKTHROUGHS, ids=names)
def test_every_measured_number_in_prose_stands_in_an_output(path: Path):
    outputs = "\n".join(body for info, body in FENCED.findall(path.read_text("utf-8")) if info.startswith("text"))
    printed = {float(number) for number in re.findall(r"\d*\.\d+", outputs)}
    claimed = re.findall(r"(?<![\w.])\d*\.\d{2,}(?!\w)", prose(path))
    assert [number for number in claimed if float(number) not in printed] == []


@pytest.mark.parametrize("path", WALKTHROUGHS, ids=names)
def test_every_picture_is_made_by_the_build(path: Path):
    from docs.build import parse_pictures

    made = {picture.file for picture in parse_pictures(path.read_text("utf-8"))}
    assert made == shown(path)
    assert all((DOCS / file).exists() for file in made)


def test_no_picture_is_left_over():
    pages = [*DOCS.rglob("*.md"), DOCS.parent / "README.md"]
    used = {name for page in pages for name in re.findall(r"pictures/([\w.-]+)\)", page.read_text("utf-8"))}
    assert {path.name for path in (DOCS / "pictures").iterdir()} == used


TINY = """# A page

```sh
mkdir runs && echo 0.123  12 > runs/a && cat runs/a && ls train.py
```

```python
from pathlib import Path

number = 41
print(Path("runs/a").read_text().strip())
```

```text
of an earlier time
and longer
```

```sh gpu
false
```

```python
print(number + 1, "words")
```

```text varies
anything
```
"""


def page(folder: Path, text: str = TINY) -> Path:
    path = folder / "page.md"
    path.write_text(text, "utf-8")
    return path


def outputs(path: Path) -> list[str]:
    return [body.strip("\n") for info, body in FENCED.findall(path.read_text("utf-8")) if info.startswith("text")]


def test_a_build_writes_what_is_printed_and_nothing_else(tmp_path: Path, cli):
    path = page(tmp_path)
    assert cli("docs.build", path).exit_code == 0
    assert outputs(path) == ["0.123 12\ntrain.py", "0.123 12", "42 words"]
    built = path.read_text("utf-8")
    assert FENCED.sub("", built).split() == FENCED.sub("", TINY).split()
    assert cli("docs.build", "--check", path).exit_code == 0
    assert cli("docs.build", path).exit_code == 0
    assert path.read_text("utf-8") == built


PRINTS = """```sh
printf 'score  change\\n 0.123  0.1  better\\n\\nwords of three\\n'
```

```text%s
%s
```
"""


@pytest.mark.parametrize(
    ("sameness", "stands", "told"),
    [
        ("", "score  change\n 0.123  0.1  better\n\nwords of three", ""),
        ("", "score  change\n 0.124  0.1  better\n\nwords of three", "7|-  0.124  0.1  better|+  0.123  0.1  better"),
        (" measured", "score   change\n-9.1  -0.2  worse\n\nwords of three", ""),
        (" measured", "score  change\n 0.1\n\nwords of three", "7|-  0.1|+  0.123  0.1  better"),
        (" measured", "score  change\n 0.123  0.1  better\n\nwords of 3", "9|- words of 3|+ words of three"),
        (" varies", "score of old\n\nwords and\nmore", ""),
        (" varies", "score\n\nno word\nless", "8|- no word|+ words of three"),
        (" varies", "score\n 1\n 2", "9|+ words of three"),
    ],
)  # fmt: skip
def test_a_check_compares_what_an_output_says_is_the_same_anywhere(
    tmp_path: Path, cli, sameness: str, stands: str, told: str
):
    path = page(tmp_path, PRINTS % (sameness, stands))
    before = path.read_text("utf-8")
    result = cli("docs.build", "--check", path)
    line, *lines = told.split("|")
    assert result.exit_code == bool(told)
    assert result.stdout == (
        f"{path}:{line}: printed now is\n" + "".join(f"    {one}\n" for one in lines) if told else ""
    )
    assert path.read_text("utf-8") == before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("```python\nx = 1\nassert x == 2\n```\n", "page.md:2: its line 2: AssertionError: "),
        ("# a\n```sh\necho no >&2; exit 3\n```\n", "page.md:3: ends with 3: no"),
        ("\n```sh\necho\n", "page.md:2: this block is never closed"),
        (
            "```sh\necho\n```\n```text vary\n```\n",
            "page.md:4: an output is ```text, or that and one of measured, varies",
        ),
    ],
    ids=["an assert", "a command", "a fence", "an output"],
)
def test_what_fails_is_named_with_its_line_and_changes_nothing(tmp_path: Path, cli, text: str, said: str):
    path = page(tmp_path, text)
    result = cli("docs.build", path)
    assert result.exit_code == 1
    assert said in result.stderr
    assert path.read_text("utf-8") == text


def test_a_check_asks_for_outputs_and_for_something_in_them(tmp_path: Path, cli):
    path = page(tmp_path, "```sh\necho a\n```\n\n```sh\ntrue\n```\n\n```text varies\nwords\n```\n")
    result = cli("docs.build", "--check", path)
    assert result.exit_code == 1
    assert result.stdout == f"{path}:1: no ```text block below\n{path}:10: printed now is\n    - words\n"


def test_a_command_is_not_run_again_in_a_folder_that_is_kept(tmp_path: Path, cli):
    path, work = page(tmp_path, "```sh\ndate +%N >> runs; wc -l < runs\n```\n"), tmp_path / "work"
    for _ in range(2):
        assert cli("docs.build", path, "--work", work).exit_code == 0
        assert outputs(path) == ["1"]
    path.write_text(path.read_text("utf-8").replace("date", "echo"), "utf-8")
    assert cli("docs.build", path, "--work", work).exit_code == 0
    assert outputs(path) == ["2"]


def test_pictures_come_from_what_a_run_left_for_tensorboard(tmp_path: Path, cli):
    path = page(
        tmp_path,
        "```python\nimport numpy as np\nfrom torch.utils.tensorboard import SummaryWriter\n"
        'with SummaryWriter("runs/a/tb") as writer:\n    for step in (1, 2):\n'
        '        writer.add_scalar("train/loss", 1 / step, step)\n'
        '    writer.add_image("seen/0", np.full((3, 4, 5), 7, np.uint8), 2)\nprint("ok")\n```\n\n'
        "<!-- curves runs/a: train/loss log -->\n![a](pictures/a.svg)\n\n"
        "<!-- image runs/a: seen/0 -->\n![b](pictures/b.png)\n",
    )
    assert cli("docs.build", path).exit_code == 0
    svg = (tmp_path / "pictures/a.svg").read_text("utf-8")
    assert svg.startswith("<svg xmlns=") and "polyline" in svg and "train/loss" in svg
    image = Image.open(tmp_path / "pictures/b.png")
    assert (image.size, image.convert("RGB").getpixel((0, 0))) == ((5, 4), (7, 7, 7))
    (tmp_path / "pictures/b.png").unlink()
    result = cli("docs.build", "--check", path)
    assert (result.exit_code, result.stdout) == (1, f"{path}: pictures/b.png is missing\n")


def own_cores() -> set[int]:
    """Return the cores of this process: all, or its share where xdist runs several.

    Two trainings with two threads each on two cores take a third longer than with one thread each.
    """
    worker, count = os.environ.get("PYTEST_XDIST_WORKER", "gw0"), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    cores = sorted(os.sched_getaffinity(0))
    return set(cores[int(worker.removeprefix("gw")) % count :: count]) or set(cores)


@pytest.mark.slow
@pytest.mark.parametrize("path", WALKTHROUGHS, ids=names)
def test_a_walkthrough_is_still_true(path: Path):
    """Run all of it from an empty runs/: 9 and 17 minutes of a core's time."""
    pinned = {"preexec_fn": lambda: os.sched_setaffinity(0, own_cores())} if hasattr(os, "sched_setaffinity") else {}
    done = subprocess.run(
        [sys.executable, str(DOCS / "build.py"), "--check", str(path)],
        cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, **pinned,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
