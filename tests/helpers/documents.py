"""The documents as tests read them: fenced blocks, commands, links."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from helpers.paths import ROOT

GENERATED = ("docs/reference/commands.md", "docs/reference/keys.md")
PROGRAMS = ("cifar", "python", "torchrun", "make", "wandb", "pip", "sbatch", "kubectl", "source", "export", "sed")


@dataclass(frozen=True)
class Block:
    """A fenced block. `language` is "" where the fence names none; {include} and the like keep their braces."""

    file: str
    line: int
    language: str
    text: str


@dataclass(frozen=True)
class Command:
    """A command of a document: in a ```sh block, or in a `code span` that begins as a command does."""

    file: str
    line: int
    text: str

    @property
    def words(self) -> list[str]:
        """Without variables in front; `python -m cifar`, `torchrun ... -m cifar` and `cifar` are one program."""
        words = shlex.split(self.text)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        if words and words[0] in ("python", "torchrun") and "cifar" in words and words[words.index("cifar") - 1] == "-m":
            return words[words.index("cifar") :]
        return words

    @property
    def key(self) -> str:
        """What tells commands apart: without quotes and the way in which the program is started."""
        return " ".join(self.words)


def documents() -> list[Path]:
    """Every document that people read, generated ones too."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"]
    return found + sorted(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts)


def read_blocks(path: Path) -> Iterator[Block]:
    """The fenced blocks of a document, in order."""
    language, start, lines = None, 0, list[str]()
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if line.startswith("```"):
            if language is None:
                language, start, lines = line[3:].strip(), number, []
            else:
                yield Block(name_of(path), start, language, "\n".join(lines) + "\n")
                language = None
        elif language is not None:
            lines.append(line)
    assert language is None, f"{path}: a block of line {start} is not closed"


def read_commands(path: Path) -> Iterator[Command]:
    """The commands of a document, in order."""
    for block in read_blocks(path):
        if block.language == "sh":
            for number, line in enumerate(block.text.splitlines(), block.line + 1):
                if text := _without_comment(line):
                    yield Command(name_of(path), number, text)
    text = re.sub(r"```.*?```", lambda found: "\n" * found[0].count("\n"), path.read_text("utf-8"), flags=re.S)
    for found in re.finditer(r"`([^`\n]+)`", text):
        words = found[1].split()
        if len(words) > 1 and words[0] in PROGRAMS:
            yield Command(name_of(path), text[: found.start()].count("\n") + 1, found[1])


def read_links(path: Path) -> Iterator[tuple[str, str]]:
    """(target, anchor) of the links and pictures of a document, without those to other sites."""
    text = re.sub(r"```.*?```", "", path.read_text("utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text)):
        if "://" not in target:
            file, _, anchor = target.partition("#")
            yield file, anchor


def find_anchors(path: Path) -> set[str]:
    """The anchors that links into a document may name: of its headings, and those that it sets itself."""
    text = re.sub(r"```.*?```", "", path.read_text("utf-8"), flags=re.S)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.M)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r"^\(([\w-]+)\)=$", text, flags=re.M))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _without_comment(line: str) -> str:
    return shlex.join(shlex.split(line, comments=True)) if line.strip() and not line.lstrip().startswith("#") else ""
