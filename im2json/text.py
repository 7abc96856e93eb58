"""Text from outside: names that are not UTF-8, byte-order marks, texts too long to print, words for a shell.

A file name that is not UTF-8 holds lone surrogates in Python (PEP 383). Files that we write spell them as JSON does, so
`caf\\xe9.png` is `caf\\udce9.png`, which json.loads and the system take for the same name.
"""

from __future__ import annotations

import codecs
import os
import re
import shlex

from im2json.errors import UserError

SHOWN = 100
"""Characters of a text that an error shows."""

_SURROGATE = re.compile("[\ud800-\udfff]")


def escape_surrogates(text: str) -> str:
    """Return a text with its lone surrogates, which no UTF-8 file can hold, as JSON escapes."""
    return text if text.isascii() else _SURROGATE.sub(lambda match: f"\\u{ord(match.group()):04x}", text)


def is_utf8(text: str) -> bool:
    """Return whether a text can be written as UTF-8, which lone surrogates cannot."""
    return text.isascii() or _SURROGATE.search(text) is None


def is_path(text: str) -> bool:
    """Return whether a text can be the name of a file."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def decode(data: bytes, where: str) -> str:
    """Return the text of a file that a user may have written, without its byte-order mark.

    Raises:
        UserError: if it is not UTF-8, beginning with `where`.
    """
    refuse_utf16(data, where)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: is not UTF-8 text (byte {error.start})") from None


def refuse_utf16(beginning: bytes, where: str) -> None:
    """Refuse a file that begins with the byte-order mark of UTF-16 or UTF-32.

    Raises:
        UserError: beginning with `where`.
    """
    if beginning.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
        raise UserError(f"{where}: is UTF-16 or UTF-32 text; save it as UTF-8")


def shortened(text: str, most: int = SHOWN) -> str:
    """Return a text, or its beginning and its length if it has more than `most` characters."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"


def command_line(*words: object) -> str:
    """Return words as one line that a shell reads as these words."""
    return " ".join(map(_shell_word, map(str, words)))


def _shell_word(word: str) -> str:
    if is_utf8(word):
        return shlex.quote(word)
    spelled = "".join(chr(b) if 0x20 <= b < 0x7F and b not in b"'\\" else f"\\{b:03o}" for b in os.fsencode(word))
    return f"$'{spelled}'"  # which POSIX has had since 2024, and bash and zsh long before
