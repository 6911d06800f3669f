"""Every exit code of `edge-vlm` and what ends with it, from the tree of errors."""

from __future__ import annotations

import re
from collections.abc import Iterator

from edge_vlm import errors
from edge_vlm.errors import EdgeVlmError, export, requests

_BRANCH = re.compile(
    r"^[ |`]*(?:-- )?(?P<name>[A-Z]\w+) +(?P<exit>\d+) +(?P<code>E-[A-Z0-9-]+) *(?P<text>.*)$"
)

BESIDES = {
    0: "done; `serve` and a watched camera end so after Ctrl-C too",
    1: "a bug of ours; `doctor`: serving needs something that is missing; `plan`: it"
    " does not fit, or a forecast of `--check` is off",
    2: "the command line is wrong: one line says what, and the closest option",
    130: "stopped by Ctrl-C before the end",
    141: "nobody reads the output any more, as `edge-vlm ... | head` ends",
}
"""What is no error of the tree, or not only."""
AREAS = {
    2: "a setting, recipe or file of options",
    3: "a checkpoint",
    4: "a bundle",
    5: "a video, camera or other source",
    6: "a picture",
    7: "a message or request that the other side cannot take",
    8: "the server is not there, is full or wants a key",
    9: "a library is not installed; the line says how",
    10: "a session: a question, an alert, its memory",
    11: "an engine, TensorRT or the GPU",
    12: "an export, or a full disk",
    13: "the output of an alert",
    14: "a recording",
    15: "training data",
    16: "standard output takes no more",
    17: "weights from a model hub",
}


def described() -> dict[str, tuple[int, str, str]]:
    """By class name: exit code, code and text, as the tree of `edge_vlm.errors` has them."""
    lines = (_BRANCH.match(line.strip()) for line in (errors.__doc__ or "").splitlines())
    return {
        found["name"]: (int(found["exit"]), found["code"], found["text"])
        for found in lines
        if found
    }


def classes() -> Iterator[type[EdgeVlmError]]:
    """Every error that has a code, in the order in which they are defined."""
    for module in (errors, export, requests):
        for value in vars(module).values():
            is_error = isinstance(value, type) and issubclass(value, EdgeVlmError)
            if is_error and value.__module__ == module.__name__:
                yield value


def table() -> list[tuple[int, str, list[tuple[str, str]]]]:
    """Exit code, what it is about, and its error codes, each with its text; by exit code."""
    codes: dict[int, list[tuple[str, str]]] = {}
    texts = described()
    for kind in classes():
        codes.setdefault(kind.exit_code, []).append(
            (kind.code, texts.get(kind.__name__, (0, "", ""))[2])
        )
    found = []
    for number in sorted({*codes, *BESIDES}):
        about = [BESIDES.get(number), AREAS.get(number)]
        found.append((number, "; or ".join(text for text in about if text), codes.get(number, [])))
    return found


def as_text() -> str:
    """For a terminal."""
    lines = ["exit codes of edge-vlm; an error's line on stderr begins with its code", ""]
    for number, about, codes in table():
        lines.append(f"{number:>3}  {about.replace('`', '')}")
        lines += [f"       {code:<22}  {text}".rstrip() for code, text in codes]
    return "\n".join(lines)


def as_markdown() -> str:
    """docs/exit-codes.md."""
    lines = [
        "# Exit codes",
        "",
        "Made by `python -m docs.build_exit_codes docs/exit-codes.md` from `edge_vlm/errors`;",
        "`edge-vlm help exit-codes` prints the same. An error is one line on standard error: what",
        "happened, where, and what to do about it, behind its code.",
        "",
        "```sh",
        "edge-vlm help exit-codes",
        "```",
        "",
        "| exit code | what ends so | codes of errors |",
        "| ---: | --- | --- |",
    ]
    for number, about, codes in table():
        named = "<br>".join(f"`{code}`{': ' + text if text else ''}" for code, text in codes)
        lines.append(f"| {number} | {about} | {named} |")
    return "\n".join(lines) + "\n"
