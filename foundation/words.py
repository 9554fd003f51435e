"""Text from elsewhere (error messages, class names, file names), made fit to be shown on one line of a terminal."""

from __future__ import annotations

import unicodedata

LONGEST = 2000
"""Characters of a message that are shown: what a library says can be a whole tensor."""


def printable(text: str, longest: int = LONGEST) -> str:
    """`text` with what a terminal would obey (escape sequences, NUL, bells, marks that reverse the reading direction)
    written out, as `\\x1b`, and cut in the middle where it is longer than `longest` characters.
    """
    if len(text) > longest:
        half = longest // 2
        text = f"{text[:half]} ... ({len(text) - 2 * half:,} characters left out) ... {text[-half:]}"
    if text.isprintable():
        return text
    return "".join(character if _harmless(character) else _written_out(character) for character in text)


def _harmless(character: str) -> bool:
    return character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _written_out(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
