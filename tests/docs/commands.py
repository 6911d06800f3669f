"""The commands of README and docs, as a reader would type them.

A command block is a fenced block that is tagged `sh`, or has no tag and begins with a command; a
line that begins with `$ ` in a block of output is one too. What cannot run right after `make demo`
says so where the reader sees it, with one of the words of NEEDS:

- behind the command: `edge-vlm watch --source webcam    # needs a camera`
- for all of a block, in the line above it: `*Needs a GPU.*`

and what takes minutes or more: `# takes half an hour`, `*Takes two hours.*`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT

PAGES = (
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *(path for path in (ROOT / "examples" / "README.md",) if path.exists()),
)

NEEDS = {
    "a camera": "edge-vlm: needs a camera on this machine or in the network",
    "a GPU": "edge-vlm: needs a GPU and TensorRT",
    "a Jetson": "edge-vlm: needs a Jetson",
    "several GPUs": "edge-vlm: needs several GPUs",
    "TensorRT": "edge-vlm: needs TensorRT or TensorRT for RTX",
    "Molmo2's weights": "edge-vlm: needs the published weights, 20 GB",
    "the network": "edge-vlm: installs or downloads",
    "videos of your own": "edge-vlm: needs footage of your own",
    "a training run": "edge-vlm: needs what hours of training wrote",
    "a receiver": "edge-vlm: needs somebody who takes alerts at that address",
    "a broker": "edge-vlm: needs an MQTT broker",
    "another machine": "edge-vlm: names a machine that is yours",
    "an agent": "edge-vlm: is run by an agent's program",
    "Ctrl-C": "edge-vlm: goes on until Ctrl-C",
    "docker": "edge-vlm: needs docker",
    "root": "edge-vlm: changes this machine",
    "a checkout": "edge-vlm: belongs to the tests, in a clone with `make test`",
}
"""By the words behind `needs`: why a test does not run it."""
IMPLIED = {
    **dict.fromkeys(("pip", "hf", "npm", "uvx"), "the network"),
    **dict.fromkeys(("sudo", "apt", "systemctl", "journalctl"), "root"),
    **dict.fromkeys(("mosquitto_pub", "mosquitto_sub"), "a broker"),
    **dict.fromkeys(("nvpmodel", "jetson_clocks"), "a Jetson"),
    **dict.fromkeys(("ssh", "scp"), "another machine"),
    **{"docker": "docker", "claude": "an agent", "torchrun": "several GPUs"},
}
"""What a program needs without saying so."""
TAKES = "edge-vlm: takes long, run by `make docs`"

WORDS = {
    *("edge-vlm", "make", "pip", "python", "torchrun", "curl", "hf", "echo", "docker", "sudo"),
    *("git", "cd", "source", "cp", "mkdir", "mosquitto_sub", "mosquitto_pub", "apt", "npm"),
    *(
        "claude",
        "lmms/bin/python",
        "uvx",
        "systemctl",
        "journalctl",
        "openssl",
        "kill",
        "chmod",
        "jq",
        "cat",
    ),
    *("printf", "lmms/bin/pip", "nvpmodel", "jetson_clocks", "python3", "ls", "grep", "ssh", "scp"),
}
SHELLS = ("sh", "bash", "console", "shell")
_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.S | re.M)
_ABOVE = re.compile(r"^\*(?P<mark>(Needs|Takes) .+?)\.\*\s*\Z", re.M)
_BEHIND = re.compile(r"\s#\s*(?P<comment>.*)$")
_ASSIGNMENT = re.compile(r"^\w+=\S*$")


@dataclass(frozen=True)
class DocCommand:
    """One command. `line`: of the page; `text`: without prompt, comment and line breaks."""

    page: Path
    line: int
    text: str
    needs: str | None
    """A key of NEEDS, or words that are none."""
    takes: bool

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def words(self) -> list[str]:
        """As a shell splits them, without assignments before the command."""
        words = shlex.split(self.text)
        while words and _ASSIGNMENT.match(words[0]):
            del words[0]
        return words

    @property
    def edge_vlm(self) -> list[list[str]]:
        """Arguments of every `edge-vlm` in it, also behind a pipe or `python -m`."""
        found = []
        for part in re.split(r"\s(?:\||&&|;)\s|\s&\s*$", f"{self.text} "):
            words = shlex.split(part.strip().rstrip("&"))
            while words and _ASSIGNMENT.match(words[0]):
                del words[0]
            words = words[: next((i for i, w in enumerate(words) if w[0:1] in "<>" and w), None)]
            if words[:1] and words[0].rpartition("/")[2] == "edge-vlm":
                found.append(words[1:])
            elif "edge_vlm" in words and words[words.index("edge_vlm") - 1] == "-m":
                found.append(words[words.index("edge_vlm") + 1 :])
        return found


def commands_of(page: Path) -> list[DocCommand]:
    return list(_commands_in(page, page.read_text(encoding="utf-8")))


def _commands_in(page: Path, text: str) -> Iterator[DocCommand]:
    for fence in _FENCE.finditer(text):
        tag, body = fence.groups()
        first = text.count("\n", 0, fence.start(2)) + 1
        lines = list(_joined(body))
        above = _ABOVE.search(text[: fence.start()].rstrip("\n").rpartition("\n\n")[2])
        mark = above["mark"] if above else ""
        is_output = any(line.startswith("$ ") for _, line in lines)
        if is_output:
            lines = [(n, line[2:]) for n, line in lines if line.startswith("$ ")]
        elif tag in ("", *SHELLS):
            if tag == "" and not (lines and _is_command(lines[0][1])):
                continue
        else:
            continue
        for number, line in lines:
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            behind = _BEHIND.search(_outside_quotes(line))
            comment = "" if behind is None else line[behind.start("comment") :]
            told = line if behind is None else line[: behind.start()]
            yield DocCommand(
                page=page,
                line=first + number,
                text=told.strip(),
                needs=_needs(comment) or _needs(mark) or _implied(told),
                takes="takes " in comment.lower() or mark.startswith("Takes"),
            )


def _implied(line: str) -> str | None:
    words = [word for word in line.split() if not _ASSIGNMENT.match(word)]
    if words[:2] == ["edge-vlm", "mcp"] and "--http" not in words:
        return "an agent"
    if words[:2] == ["edge-vlm", "watch"] and "--stream" in words:
        return "Ctrl-C"
    return IMPLIED.get(words[0]) if words else None


def _outside_quotes(line: str) -> str:
    """The line with what stands in quotes made harmless, as long as before."""
    return re.sub(r"'[^']*'|\"[^\"]*\"", lambda found: "q" * len(found[0]), line)


def _needs(words: str) -> str | None:
    found = re.search(r"\b[Nn]eeds (.+)", words)
    if found is None:
        return None
    return next((key for key in NEEDS if found[1].startswith(key)), found[1])


def _joined(body: str) -> Iterator[tuple[int, str]]:
    """Logical lines and where they begin: joined at a backslash and inside quotes."""
    held, start = "", 0
    for number, line in enumerate(body.splitlines()):
        if not held:
            start = number
        held += line
        if held.endswith("\\"):
            held = held[:-1].rstrip() + " "
            continue
        code = held.partition(" # ")[0]
        if code.count("'") % 2 and code.lstrip("$ ").split(" ")[0] in WORDS:
            held += "\n"
            continue
        yield start, held
        held = ""
    if held:
        yield start, held


def _is_command(line: str) -> bool:
    words = line.split()
    while words and _ASSIGNMENT.match(words[0]):
        del words[0]
    return bool(words) and words[0] in WORDS


def main() -> None:
    """`python -m tests.docs.commands`: every command, and why one is not run."""
    for page in PAGES:
        for command in commands_of(page):
            reason = TAKES if command.takes else "is run"
            if command.needs is not None:
                reason = NEEDS[command.needs]
            print(f"{command.where}: {command.text}\n    {reason}")


if __name__ == "__main__":
    main()
