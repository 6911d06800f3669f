"""What may be printed of an address or a pipeline: everything but what lets somebody in."""

from __future__ import annotations

import re

HIDDEN = "***"

_STRONG = r"pass(?:word|wort|wd|phrase|code)|passwd|secret|token|credentials?|api[-_.]?key"
_STRONG += r"|access[-_.]?key|auth[-_.]?key|stream[-_.]?key"
"""Also at the end of longer words, as in `userPassword`."""
_WEAK = r"pass|pw|pwd|psw|pin|key|auth|authorization|sig|signature|session|sid|jwt|bearer"
_WEAK += r"|user|users|user[-_.]?name|user[-_.]?id|usr|login|account"
"""Only as words of their own: `user-pw`, but not `keyframe` or `bypass`."""
_NAMED = re.compile(
    rf"(?P<name>(?:[\w.-]*?(?:{_STRONG})|(?<![A-Za-z0-9])(?:[A-Za-z0-9]+[-_.])*?(?:{_WEAK}))\d*)"
    r"(?P<is>[\"']?\s*(?:=|%3d)\s*(?:\(\w+\)\s*)?)"
    r"(?P<value>\\?\"(?:\\.|[^\"\\])*(?:\\?\"|$)|'[^']*(?:'|$)|[^\s&]*)",
    re.IGNORECASE,
)
_SAID = re.compile(
    rf"((?:[\w.-]*(?:{_STRONG})|authorization)[\"']?\s*:\s*(?:(?:basic|bearer|digest)\s+)?)"
    r"(?:\"[^\"]*(?:\"|$)|'[^']*(?:'|$)|[^\s,;]+)",
    re.IGNORECASE,
)
_SCHEME = re.compile(r"\b(basic|bearer)\s+[\w.~+/=-]{6,}", re.IGNORECASE)
_URL = re.compile(r"(?P<scheme>\b[a-z][a-z0-9+.-]*:/{1,3})(?P<rest>[^\s\"'<>!]*)", re.IGNORECASE)
_BARE = re.compile(r"(?<![\w/:*])[^\s/:@\"'=()]+:(?!/)[^\s@\"']+@(?=[\w\[])")
_PORT = re.compile(r"[^:@]*(?::\d*)?|\[[0-9a-f:.%]+\](?::\d*)?", re.IGNORECASE)
"""A host, with or without its port."""


def mask_credentials(text: str) -> str:
    """Users, passwords, tokens and keys in `text` become ***, however they are written.

    `scheme://user:password@host`, `user=...&password=...` in a path or a query, `user-pw=...` of a
    pipeline, `Authorization: ...`; in any case, and where a quote is missing up to the end.
    """
    text = _NAMED.sub(rf"\g<name>\g<is>{HIDDEN}", text)
    text = _SAID.sub(rf"\g<1>{HIDDEN}", text)
    text = _SCHEME.sub(rf"\g<1> {HIDDEN}", text)
    return _BARE.sub(f"{HIDDEN}@", _mask_urls(text))


def _mask_urls(text: str) -> str:
    masked, position = [], 0
    while (found := _URL.search(text, position)) is not None:
        masked.append(text[position : found.end("scheme")])
        position = found.end("scheme") + _userinfo(text[found.end("scheme") :], found["rest"])
        if position > found.end("scheme"):
            masked.append(HIDDEN)
        step = max(position, found.end("scheme"))
        rest = re.match(r"[^\s\"'<>!]*", text[step:])
        masked.append("" if rest is None else rest[0])
        position = step + len(masked[-1])
    return "".join([*masked, text[position:]])


def _userinfo(text: str, run: str) -> int:
    """How many characters before the @ of a URL, whose scheme is gone, tell user and password.

    `run`: the beginning of `text` up to what usually ends a URL. A password may hold anything.
    """
    authority = re.split(r"[/?#\\]", run, maxsplit=1)[0]
    if "@" in authority:
        return max(run.rfind("@"), 0)
    if ":" not in authority:
        return 0
    at = run.rfind("@")
    if at >= 0:
        return at
    if _PORT.fullmatch(authority):
        return 0
    # No @ where it should be: a blank, a quote or an ! in the password, or the text is cut off.
    later = re.match(r"[^@]{0,200}@(?:[^\s\"'<>]*@)?", text)
    if later is not None and "://" not in later[0]:
        return later.end() - 1
    return len(run)
