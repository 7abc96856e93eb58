"""Make an HTML page of examples as training sees them: document, target, and which tokens are learned."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from PIL import Image

from im2json.jsontext import dumps
from im2json.report.page import html_page

LONGEST_SIDE = 700
"""Pixels of a document; larger documents are scaled down."""

_STYLE = """
section { display: grid; grid-template-columns: minmax(0, 2fr) minmax(0, 3fr); gap: 1.5em }
h2 { grid-column: 1 / -1; margin: 0; font-size: 1.1em }
img { max-width: 100%; border: 1px solid var(--border); display: block; margin-bottom: 1em }
pre, .tokens { font: 13px/1.7 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 0 1em }
.tokens span { border-radius: 3px; padding: 1px 2px; margin-right: 2px; color: var(--muted); background: var(--page) }
.tokens span.learned { color: var(--ink); background: light-dark(#cfe9d8, #1f5136) }
"""


@dataclass(frozen=True)
class Preview:
    """An example of a batch."""

    id: str
    document: Image.Image
    seen: Image.Image  # the picture that the model gets
    target: dict[str, Any]
    tokens: list[tuple[str, bool]]  # text, and whether the token is a label


def preview_page(title: str, notes: str, previews: Iterable[Preview]) -> str:
    """Return one HTML file that needs no other, with the notes and a section for each example."""
    sections = "\n".join(map(_section, previews))
    return html_page(
        title,
        _STYLE,
        f"""<pre>{html.escape(notes)}</pre>
<p class="tokens">Below, <span>grey tokens</span> are given to the model; <span class="learned">green ones</span> are
what it learns to write, and all that the loss counts.</p>
{sections}""",
    )


def _section(example: Preview) -> str:
    tokens = "".join(
        f"<span{' class=learned' if learned else ''}>{html.escape(text)}</span>" for text, learned in example.tokens
    )
    learned = sum(learned for _, learned in example.tokens)
    target = dumps(example.target, ensure_ascii=False, indent=2)
    width, height = example.seen.size
    return f"""<section>
<h2>{html.escape(example.id)}</h2>
<div>{_picture(example.document)}as the model sees it, {width} x {height}:{_picture(example.seen)}</div>
<div><pre>{html.escape(target)}</pre>
<div class="tokens">{tokens}</div>
{learned} tokens are learned</div>
</section>"""


def _picture(picture: Image.Image) -> str:
    shown = picture.copy()
    shown.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    stream = BytesIO()
    shown.save(stream, "JPEG", quality=85)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}">'
