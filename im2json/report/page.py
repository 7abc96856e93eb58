"""The frame of an HTML page that is one file. It needs no network, and is dark if the reader's screen is."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from im2json.text import escape_surrogates

_STYLE = """
:root { color-scheme: light dark; --ink: light-dark(#1d232b, #e3e6ea); --muted: light-dark(#5d6671, #a0a8b2);
        --page: light-dark(#eef0f3, #14171b); --card: light-dark(#fff, #1d2126);
        --border: light-dark(#c9ced6, #3b424b) }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1300px; padding: 0 1em;
       color: var(--ink); background: var(--page) }
section { background: var(--card); border: 1px solid var(--border); margin: 1.5em 0; padding: 1em }
h1, h2, h3 { overflow-wrap: anywhere }
"""


def html_page(title: str, style: str, body: str) -> str:
    """Return a whole HTML file that UTF-8 can hold, with the title as its heading."""
    return escape_surrogates(f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title>
<style>{_STYLE}{style}</style>
<h1>{html.escape(title)}</h1>
{body}
</html>
""")


def html_table(headers: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table. Its cells are HTML, its headers are text."""
    head = "".join(f"<th>{html.escape(header)}</th>" for header in headers)
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'
