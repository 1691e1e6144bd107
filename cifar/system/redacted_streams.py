"""Output without secrets: the standard streams of this process, and the output of a child on its way into a log."""

from __future__ import annotations

import atexit
import codecs
import contextlib
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TextIO, cast

from cifar.system.names import escape_controls
from cifar.system.redact import redact, secret_spellings

MAX_PENDING = 2**16  # characters of a line that has no end; then its beginning is passed on

OutputListener = Callable[[str, str], None]  # gets "stdout" or "stderr", and text without secrets; may not raise

_lock = threading.RLock()  # one for all streams: two threads may print at the same time
_listeners: list[OutputListener] = []
_unheard = threading.local()  # `depth`: how many `hide_from_listeners` are open in this thread


def _renew_lock() -> None:
    global _lock
    _lock = threading.RLock()  # another thread may have held it when this process was forked


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


class LineRedactor:
    """Text in pieces -> text without secrets. A secret may be split between two pieces, so whole lines are redacted."""

    def __init__(self) -> None:
        self._pending = ""  # the beginning of a line

    def push(self, piece: str) -> str:
        """The next piece -> what is complete by now."""
        end = piece.rfind("\n") + 1
        if not end and len(self._pending) + len(piece) < MAX_PENDING:
            self._pending += piece
            return ""
        text, self._pending = self._pending + piece[:end], piece[end:]
        return redact(text) + (self.take(keeps_beginning=True) if len(self._pending) >= MAX_PENDING else "")

    def take(self, *, keeps_beginning: bool) -> str:
        """The line that has no end yet. With `keeps_beginning`, what may begin a secret stays for the next piece."""
        text, self._pending = self._pending, ""
        if keeps_beginning and text:
            self._pending = _secret_beginning(text)
            text = text[: len(text) - len(self._pending)]
        return redact(text) if text else ""


def _secret_beginning(text: str) -> str:
    """The longest end of a text with which a secret begins: one of this machine, or the password of a URL."""
    spellings = secret_spellings()
    longest = max(map(len, spellings), default=1)
    for start in range(max(0, len(text) - longest + 1), len(text)):
        end = text[start:]
        if any(spelling.startswith(end) and len(spelling) > len(end) for spelling in spellings):
            return end
    match = re.search(r"(?:://[^\s/]{0,1024}|:/?|[?&;][\w.-]{0,80}(?:=\S{0,512})?|\w+=\S{0,512})$", text)
    return match[0] if match else ""


class RedactedStream:
    """A text stream that passes on what is written to it without secrets. Everything else is the stream's own.

    A line is passed on when it ends. `flush` passes on its beginning too, so prompts and progress bars are seen.
    """

    def __init__(self, stream: TextIO, name: str = "stdout") -> None:
        self._stream, self._name, self._lines = stream, name, LineRedactor()
        self.is_framed = False  # see `frame_output`

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        with _lock:
            if complete := self._lines.push(text):
                self._write_redacted(complete)
        return len(text)

    def _write_redacted(self, text: str) -> None:
        if not getattr(_unheard, "depth", 0):
            for listener in _listeners:
                listener(self._name, text)
        if self.is_framed:
            text = _FRAME_START + re.sub("[\x02\x03]", "", text) + _FRAME_END
        self._stream.write(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        # In a terminal everything is seen at once: a bar that lacks its last character would look broken.
        self._pass_on(keeps_beginning=not self._stream.isatty())
        self._stream.flush()

    def finish(self) -> None:
        """Pass on all that is left."""
        with contextlib.suppress(OSError, ValueError):  # closed, or nobody reads it any more
            self._pass_on(keeps_beginning=False)
            self._stream.flush()

    def _pass_on(self, *, keeps_beginning: bool) -> None:
        with _lock:
            if rest := self._lines.take(keeps_beginning=keeps_beginning):
                self._write_redacted(rest)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stream)


@contextlib.contextmanager
def redact_output() -> Iterator[None]:
    """While this is open, what this process prints has no secrets."""
    if isinstance(sys.stdout, RedactedStream):
        yield
        return
    before = sys.stdout, sys.stderr
    redacted: list[Any] = [RedactedStream(stream, name) for stream, name in zip(before, ("stdout", "stderr"), strict=True)]
    sys.stdout, sys.stderr = redacted
    try:
        yield
    finally:
        for stream in redacted:
            stream.finish()
        if sys.stdout is redacted[0]:  # else somebody has replaced it since
            sys.stdout = before[0]
        if sys.stderr is redacted[1]:
            sys.stderr = before[1]


def install_redacted_output() -> None:
    """From now on, what this process prints has no secrets."""
    if not isinstance(sys.stdout, RedactedStream):
        sys.stdout = cast(TextIO, RedactedStream(sys.stdout, "stdout"))
        sys.stderr = cast(TextIO, RedactedStream(sys.stderr, "stderr"))
        atexit.register(finish_output)


@contextlib.contextmanager
def listen_to_output(listener: OutputListener) -> Iterator[None]:
    """While this is open, `listener` hears what this process prints through its redacted streams."""
    with _lock:
        _listeners.append(listener)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, RedactedStream):
                stream.finish()  # a line without an end was printed in this time too
        with _lock:
            _listeners.remove(listener)


@contextlib.contextmanager
def hide_from_listeners() -> Iterator[None]:
    """What this thread prints while this is open goes to the terminal only."""
    flush_output()  # what was printed before is heard
    _unheard.depth = getattr(_unheard, "depth", 0) + 1
    try:
        yield
    finally:
        _unheard.depth -= 1


def flush_output() -> None:
    """Pass on the beginning of a line that has no end yet."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, RedactedStream):
            stream.flush()


def finish_output() -> None:
    """Pass on all that was printed. For a process that ends without its exit hooks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, RedactedStream):
            stream.finish()


# Around what Python prints, where a reader of the pipe has to tell it from what libraries and child processes print.
_FRAME_START, _FRAME_END = "\x02", "\x03"


def frame_output() -> None:
    """Mark from now on what this process prints through its redacted streams, for a `FrameSplitter` at the pipe's other end."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, RedactedStream):
            stream.is_framed = True


class FrameSplitter:
    """The bytes of a process that called `frame_output`, in pieces -> (all of them, those that Python did not print)."""

    def __init__(self) -> None:
        self._is_inside = False

    def push(self, piece: bytes) -> tuple[bytes, bytes]:
        whole, foreign = [], []
        for part in re.split(b"([\x02\x03])", piece):
            if part in (b"\x02", b"\x03"):
                self._is_inside = part == b"\x02"
                continue
            whole.append(part)
            if not self._is_inside:
                foreign.append(part)
        return b"".join(whole), b"".join(foreign)


class LogRedactor:
    """The bytes that a process has printed, in pieces -> the bytes for its log: no secrets, no control characters."""

    def __init__(self) -> None:
        self._decoder, self._lines = codecs.getincrementaldecoder("utf-8")(errors="replace"), LineRedactor()

    def push(self, piece: bytes) -> bytes:
        """The lines that are complete by now. A bar that goes back to the beginning of its line becomes lines."""
        return self._clean(self._lines.push(self._decoder.decode(piece).replace("\r\n", "\n").replace("\r", "\n")))

    def finish(self) -> bytes:
        """What is left at the end."""
        rest = self._lines.push(self._decoder.decode(b"", final=True))
        return self._clean(rest + self._lines.take(keeps_beginning=False))

    @staticmethod
    def _clean(text: str) -> bytes:
        return escape_controls(text, keeps_lines=True).encode("utf-8", "replace")
