"""What is printed has no secrets, however it is split, and all else arrives as it was."""

from __future__ import annotations

import io
import itertools
import os
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cifar.system.redacted_streams import FrameSplitter, LogRedactor, RedactedStream, redact_output
from helpers.paths import ROOT

SECRET = "correct-horse-battery"


@pytest.fixture(autouse=True, scope="module")
def environment() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DB_PASSWORD", SECRET)
        yield


@given(st.lists(st.integers(0, 80), max_size=12), st.booleans())
def test_a_secret_split_anywhere_is_found(cuts: list[int], flushes: bool) -> None:
    os.environ["DB_PASSWORD"] = SECRET
    text = f"one {SECRET} two\nhttps://me:hunter22@host three {SECRET}"
    whole = io.StringIO()
    stream = RedactedStream(whole)
    edges = [0, *sorted(cuts), len(text)]
    for start, end in itertools.pairwise(edges):
        stream.write(text[start:end])
        if flushes:
            stream.flush()
    stream.finish()
    assert whole.getvalue() == "one *** two\nhttps://me:***@host three ***"


@given(st.lists(st.text(alphabet="abc \n\tß✓://@?=", max_size=8)))
def test_other_text_is_passed_on_whole(pieces: list[str]) -> None:
    whole = io.StringIO()
    stream = RedactedStream(whole)
    for piece in pieces:
        assert stream.write(piece) == len(piece)
        stream.flush()
    stream.finish()
    if "://" not in "".join(pieces):
        assert whole.getvalue() == "".join(pieces)


def test_flush_shows_the_beginning_of_a_line() -> None:
    whole = io.StringIO()
    stream = RedactedStream(whole)
    stream.write("50 % ...")
    assert whole.getvalue() == ""
    stream.flush()
    assert whole.getvalue() == "50 % ..."
    stream.write(f" {SECRET[:7]}")
    stream.flush()
    assert whole.getvalue() == "50 % ... "
    stream.write("rather not")
    stream.flush()
    assert whole.getvalue() == f"50 % ... {SECRET[:7]}rather not"


def test_a_log_has_no_secrets_and_no_controls() -> None:
    redactor, found = LogRedactor(), b""
    text = f"\x1b[31mred\x1b[0m 10 %\r20 %\r\né {SECRET}\n\xff end".encode()
    for start in range(0, len(text), 3):  # in the middle of characters, too
        found += redactor.push(text[start : start + 3])
    found += redactor.finish()
    assert found.decode() == "\\x1b[31mred\\x1b[0m 10 %\n20 %\né ***\nÿ end"


def test_the_streams_are_themselves_again(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    with redact_output():
        print(SECRET)
        print(SECRET, end="", file=sys.stderr)
        with redact_output():
            print("inside", SECRET)
        assert sys.stdout.encoding == before[0].encoding and not sys.stdout.isatty()
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr() == ("***\ninside ***\n", "***")


def test_threads_lose_nothing() -> None:
    whole = io.StringIO()
    stream = RedactedStream(whole)
    threads = [threading.Thread(target=lambda n=n: [stream.write(f"{n}\n") for _ in range(500)]) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(whole.getvalue().split()) == sorted(str(n) for n in range(4) for _ in range(500))


def test_warnings_logging_and_tracebacks_of_a_process_are_redacted() -> None:
    code = (
        "import os, sys, logging, warnings, threading\n"
        "from cifar.system.redacted_streams import install_redacted_output\n"
        "install_redacted_output()\n"
        "s = os.environ['DB_PASSWORD']\n"
        "warnings.warn(s); logging.getLogger('x').warning(s)\n"
        "def fail(): raise ValueError(s)\n"
        "thread = threading.Thread(target=fail); thread.start(); thread.join()\n"
        "print('end without a newline', s, end='')\n"
        "fail()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "DB_PASSWORD": SECRET},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 1 and SECRET not in printed and printed.count("ValueError: ***") == 2
    assert "end without a newline ***" in done.stdout and "UserWarning: ***" in done.stderr


@given(st.lists(st.tuples(st.booleans(), st.text(alphabet="ab\n\x02\x03", max_size=5)), max_size=8), st.integers(1, 4))
def test_what_python_does_not_print_is_told_apart(printed: list[tuple[bool, str]], size: int) -> None:
    """Frames around Python's text; a library writes between them, and the pipe cuts anywhere."""
    pipe = io.StringIO()
    stream = RedactedStream(pipe)
    stream.is_framed = True
    expected = ""
    for is_python, text in printed:
        if is_python:
            stream.write(text + "\n")
        else:
            text = text.translate({2: "", 3: ""})
            pipe.write(text)
            expected += text
    content, splitter = pipe.getvalue().encode(), FrameSplitter()
    pieces = [splitter.push(content[start : start + size]) for start in range(0, len(content), size)]
    assert b"".join(foreign for _, foreign in pieces).decode() == expected
    assert b"".join(whole for whole, _ in pieces) == content.translate(None, b"\x02\x03")
