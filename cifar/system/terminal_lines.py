"""What a program prints for a terminal -> the lines that stand there in the end, as a log holds them.

Progress bars go back to the beginning of their line (`\\r`), erase it and write it again. Here only the last state of each line
counts, and it counts when the line ends.
"""

from __future__ import annotations

import re

from cifar.system.names import escape_controls

MAX_LINE = 4096  # characters of a line; W&B's client cuts its lines there too

# What moves or colours: CSI sequences (ECMA-48), operating system commands such as titles, and other escapes.
_ESCAPE = re.compile(r"\x1b\[([0-9;?]*)[ -/]*([@-~])|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[@-Z\\^_]|[\r\n\b]")
_PLAIN = re.compile(r"[\x1b\r\b]")


class TerminalLines:
    """One stream's text in pieces -> its finished lines."""

    def __init__(self) -> None:
        self._line: list[str] = []
        self._column = 0
        self._escape = ""  # the beginning of a sequence that the next piece completes

    def push(self, text: str) -> list[str]:
        """The next piece -> the lines that have ended, without line ends, control characters written out."""
        if not (self._line or self._escape) and text.endswith("\n") and not _PLAIN.search(text):
            return [_clean(line) for line in text[:-1].split("\n")]  # nothing moves
        text, self._escape = self._escape + text, ""
        if (start := _unfinished_escape(text)) >= 0:
            text, self._escape = text[:start], text[start:]
        lines, position = list[str](), 0
        for match in _ESCAPE.finditer(text):
            self._write(text[position : match.start()])
            position = match.end()
            if match[0] == "\n":
                lines.append(self._take())
            elif match[0] == "\r":
                self._column = 0
            elif match[0] == "\b":
                self._column = max(0, self._column - 1)
            elif match[2] == "K":
                self._erase(match[1])
        self._write(text[position:])
        return lines

    def finish(self) -> list[str]:
        """The line that has no end, if there is one with any text."""
        line = self._take()
        return [line] if line.strip() else []

    def _write(self, text: str) -> None:
        end = min(self._column + len(text), 2 * MAX_LINE)  # a line without end takes no more memory
        text = text[: max(0, end - self._column)]
        if not text:
            return
        self._line += " " * (self._column - len(self._line))
        self._line[self._column : end] = text
        self._column = end

    def _erase(self, kind: str) -> None:
        if kind in ("", "0"):
            del self._line[self._column :]
        elif kind == "1":
            self._line[: self._column + 1] = " " * min(self._column + 1, len(self._line))
        else:
            self._line.clear()

    def _take(self) -> str:
        line, self._column = "".join(self._line), 0
        self._line.clear()
        return _clean(line)


def _unfinished_escape(text: str) -> int:
    """Where a sequence begins that has no end yet; -1 if there is none. A very long one is no sequence."""
    start = text.rfind("\x1b", max(0, len(text) - 64))
    return start if start >= 0 and not _ESCAPE.match(text, start) else -1


def _clean(line: str) -> str:
    line = line.rstrip()
    if len(line) > MAX_LINE:
        line = f"{line[:MAX_LINE]} ... ({len(line) - MAX_LINE} more characters)"
    return escape_controls(line, keeps_lines=True)  # it has tabs, and no line ends
