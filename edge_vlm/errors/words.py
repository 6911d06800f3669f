"""Words of strangers, as a terminal may show them."""

from __future__ import annotations


def visible(text: str) -> str:
    """`text` with control characters written out: names of files and words of strangers are shown
    in terminals, which obey such characters."""
    return text if text.isprintable() else "".join(map(_visible, text))


MOST_SHOWN = 2000
"""Characters: words of strangers may be megabytes long."""


def shortened(text: str) -> str:
    if len(text) <= MOST_SHOWN:
        return text
    return f"{text[: MOST_SHOWN - 200]} ... {text[-150:]}"


def _visible(character: str) -> str:
    return character if character.isprintable() else ascii(character)[1:-1]
