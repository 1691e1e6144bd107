"""One file over HTTP: resumed where it broke off, from the first address that has it, checked, once for all processes."""

from __future__ import annotations

import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cifar.errors import UserError

Progress = Callable[[int, int], None]  # (bytes so far, bytes in all)
CONNECT, READ = 10.0, 30.0  # seconds without an answer, and without another byte
TRIES = 3  # in a row without one more byte, before the next address
BLOCK = 1 << 14  # bytes; a broken connection loses the block that was under way


def download(urls: Sequence[str], path: Path, *, md5: str, size: int, progress: Progress | None = None) -> None:
    """Fetch `path` from the first of `urls` that gives `size` bytes with this MD5. Of processes that ask together one does.

    A partial transfer stays in `path`.part and is continued. Raises UserError where every address fails (with each one's
    reason), or where the folder cannot be written.
    """
    from filelock import FileLock

    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            if path.exists() and md5_of(path) == md5:
                return
            failures = []
            for url in urls:
                failure = _fetch(url, part, md5, size, progress)
                if not failure:
                    os.replace(part, path)
                    return
                failures.append(f"{url}: {failure}")
    except (OSError, NotImplementedError) as error:  # NotImplementedError: a file system without locks
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path} cannot be written ({reason}); free some space or name another folder") from error
    raise UserError(f"{path.name} could not be downloaded ({'; '.join(failures)})")


def md5_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _fetch(url: str, part: Path, md5: str, size: int, progress: Progress | None) -> str:
    """Bring `part` to `size` bytes with the right MD5. Returns why that failed, or nothing."""
    resumed = _length(part) > 0
    failure, idle, most = "", 0, _length(part)
    while idle < TRIES:
        time.sleep(0.5 * idle)
        if _length(part) < size:
            failure, final = _transfer(url, part, size, progress)
            if final:
                return failure
        if _length(part) < size:
            idle = 0 if _length(part) > most else idle + 1
            most = max(most, _length(part))
        elif _length(part) == size and md5_of(part) == md5:
            return ""
        else:
            part.unlink()
            if not resumed:
                return "the bytes are not the official file's"
            resumed, most, idle = False, 0, 0  # the part may have been another's: once more from the start
    return failure or "the connection breaks off again and again"


def _transfer(url: str, part: Path, size: int, progress: Progress | None) -> tuple[str, bool]:
    """One request that appends to `part`. Returns (what went wrong or "", whether asking this address again is useless)."""
    import requests

    have = _length(part)
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        with requests.get(url, headers=headers, stream=True, timeout=(CONNECT, READ)) as answer:
            if answer.status_code == 416:  # Range Not Satisfiable
                part.unlink()
                return "refuses to continue", False
            if answer.status_code not in (200, 206):
                return f"HTTP {answer.status_code}", answer.status_code < 500
            if answer.status_code == 206:
                given = re.match(r"bytes (\d+)-\d*/(\d+|\*)$", answer.headers.get("Content-Range", ""))
                if not given or int(given[1]) != have or given[2] not in ("*", str(size)):
                    return "continues at another place or with another file", True
            else:
                have = 0  # a server that knows no Range sends all
                if answer.headers.get("Content-Length", str(size)) != str(size):
                    return f"gives {answer.headers['Content-Length']} bytes instead of {size}", True
            with open(part, "ab" if have else "wb") as file:
                for block in answer.iter_content(BLOCK):
                    file.write(block)
                    have += len(block)
                    if progress:
                        progress(have, size)
                    if have > size:
                        return f"gives more than {size} bytes", False
    except requests.RequestException as error:  # is an OSError too, so it comes before those of the disk
        return _short(error), False
    return "", False


def _length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _short(error: Exception) -> str:
    """The innermost reason of a requests error, which otherwise repeats the address three times."""
    text = str(error)
    for pattern, meaning in (
        (r"resolve|getaddrinfo|Name or service", "the name cannot be resolved"),
        (r"[Tt]imed out", "timed out"),
        (r"refused", "connection refused"),
        (r"unreachable", "network unreachable"),
        (r"Proxy", "the proxy refuses"),
        (r"CERTIFICATE|SSL", "its certificate is not trusted"),
    ):
        if re.search(pattern, text):
            return meaning
    return type(error).__name__


@dataclass
class _Seen:
    """What a probe of one address has brought so far."""

    bytes: int = 0
    start: float = 0.0
    end: float = 0.0  # 0: still going
    size_fits: bool = False

    def rate(self) -> float:
        """Bytes a second; 0 where nothing came."""
        return self.bytes / max((self.end or time.monotonic()) - self.start, 1e-3) if self.bytes and self.size_fits else 0.0


def probe(urls: Sequence[str], size: int, seconds: float, enough: float) -> float:
    """Bytes a second from the quickest of `urls`, all asked at once; 0 where none answers with a file of `size` bytes.

    Ends within `seconds`, even where a name look-up hangs, and as soon as one gives `enough`.
    """
    deadline = time.monotonic() + seconds
    import requests  # before the threads, which are left behind if they hang

    seen = {url: _Seen() for url in urls}
    news = threading.Semaphore(0)

    def ask(url: str, result: _Seen) -> None:
        try:
            headers = {"Accept-Encoding": "identity", "Range": f"bytes=0-{size - 1}"}
            with requests.get(url, headers=headers, stream=True, timeout=(seconds, seconds)) as answer:
                total = answer.headers.get("Content-Range", "").rpartition("/")[2] or answer.headers.get("Content-Length", "")
                result.size_fits = answer.status_code in (200, 206) and total == str(size)
                result.start = time.monotonic()
                for block in answer.iter_content(1 << 11) if result.size_fits else ():
                    result.bytes += len(block)
                    if result.bytes >= 8 << 20 or time.monotonic() - result.start > 3:  # past the slow start of TCP
                        break
        except (requests.RequestException, OSError, ValueError):
            pass  # what came counts, if anything did
        finally:
            result.end = time.monotonic()
            news.release()

    for url, result in seen.items():
        threading.Thread(target=ask, args=(url, result), daemon=True).start()
    for _ in urls:
        if not news.acquire(timeout=max(deadline - time.monotonic(), 0)):
            break
        if any(result.end and result.rate() >= enough for result in seen.values()):
            break
    return max((result.rate() for result in seen.values()), default=0.0)
