"""Download a file over HTTP: from the first address that has it, resumed where it broke off, checked, by one process."""

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
CONNECT_TIMEOUT, READ_TIMEOUT = 10.0, 30.0  # seconds without an answer; without another byte
MAX_IDLE_TRIES = 3  # in a row that bring no byte, before the next address is tried
BLOCK_BYTES = 1 << 14  # a broken connection loses the block that was being sent


def download_file(urls: Sequence[str], path: Path, *, md5: str, size: int, progress: Progress | None = None) -> None:
    """Fetch `path` from the first of `urls` that gives `size` bytes with this MD5. One process does it, others wait.

    A partial transfer stays in `path`.part and is continued. Raises UserError if every address fails (with the reason of
    each), or if the folder cannot be written.
    """
    from filelock import FileLock

    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            if path.exists() and compute_md5(path) == md5:
                return
            failures = []
            for url in urls:
                failure = _download_from(url, part, md5, size, progress)
                if not failure:
                    os.replace(part, path)
                    return
                failures.append(f"{url}: {failure}")
    except (OSError, NotImplementedError) as error:  # NotImplementedError: a file system without locks
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path} cannot be written ({reason}); free some space or name another folder") from error
    raise UserError(f"{path.name} could not be downloaded ({'; '.join(failures)})")


def compute_md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _download_from(url: str, part: Path, md5: str, size: int, progress: Progress | None) -> str:
    """Bring `part` to `size` bytes with the right MD5. Returns why that failed; empty if it did not."""
    was_resumed = _file_size(part) > 0
    failure, num_idle, most_bytes = "", 0, _file_size(part)
    while num_idle < MAX_IDLE_TRIES:
        time.sleep(0.5 * num_idle)
        if _file_size(part) < size:
            failure, final = _request_remainder(url, part, size, progress)
            if final:
                return failure
        if _file_size(part) < size:
            num_idle = 0 if _file_size(part) > most_bytes else num_idle + 1
            most_bytes = max(most_bytes, _file_size(part))
        elif _file_size(part) == size and compute_md5(part) == md5:
            return ""
        else:
            part.unlink()
            if not was_resumed:
                return "the bytes are not the official file's"
            was_resumed, most_bytes, num_idle = False, 0, 0  # the part may be of another file: once more from the start
    return failure or "the connection breaks off again and again"


def _request_remainder(url: str, part: Path, size: int, progress: Progress | None) -> tuple[str, bool]:
    """One request that appends to `part`. Returns (what went wrong or "", whether asking this address again is useless)."""
    import requests

    offset = _file_size(part)
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={offset}-"} if offset else {})
    try:
        with requests.get(url, headers=headers, stream=True, timeout=(CONNECT_TIMEOUT, READ_TIMEOUT)) as answer:
            if answer.status_code == 416:  # Range Not Satisfiable
                part.unlink()
                return "refuses to continue", False
            if answer.status_code not in (200, 206):
                return f"HTTP {answer.status_code}", answer.status_code < 500
            if answer.status_code == 206:
                given = re.match(r"bytes (\d+)-\d*/(\d+|\*)$", answer.headers.get("Content-Range", ""))
                if not given or int(given[1]) != offset or given[2] not in ("*", str(size)):
                    return "continues at another place or with another file", True
            else:
                offset = 0  # a server that does not know Range sends the whole file
                if answer.headers.get("Content-Length", str(size)) != str(size):
                    return f"gives {answer.headers['Content-Length']} bytes instead of {size}", True
            with open(part, "ab" if offset else "wb") as file:
                for block in answer.iter_content(BLOCK_BYTES):
                    file.write(block)
                    offset += len(block)
                    if progress:
                        progress(offset, size)
                    if offset > size:
                        return f"gives more than {size} bytes", False
    except requests.RequestException as error:  # an OSError too, but not one of the disk
        return _summarize_error(error), False
    return "", False


def _file_size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _summarize_error(error: Exception) -> str:
    """The reason in a requests error, whose own text repeats the address three times."""
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
class _RateSample:
    """What one address has sent so far."""

    bytes: int = 0
    start: float = 0.0
    end: float = 0.0  # 0: still going
    size_fits: bool = False

    def bytes_per_second(self) -> float:
        """0 if nothing came."""
        return self.bytes / max((self.end or time.monotonic()) - self.start, 1e-3) if self.bytes and self.size_fits else 0.0


def measure_rate(urls: Sequence[str], size: int, seconds: float, enough: float) -> float:
    """Bytes a second from the quickest of `urls`, all asked at once; 0 if none answers with a file of `size` bytes.

    Ends within `seconds`, even if looking up a name hangs, and as soon as one address gives `enough`.
    """
    deadline = time.monotonic() + seconds
    import requests  # before the threads start, which are left behind if they hang

    samples = {url: _RateSample() for url in urls}
    ended = threading.Semaphore(0)

    def request_sample(url: str, result: _RateSample) -> None:
        try:
            headers = {"Accept-Encoding": "identity", "Range": f"bytes=0-{size - 1}"}
            with requests.get(url, headers=headers, stream=True, timeout=(seconds, seconds)) as answer:
                total = answer.headers.get("Content-Range", "").rpartition("/")[2] or answer.headers.get("Content-Length", "")
                result.size_fits = answer.status_code in (200, 206) and total == str(size)
                result.start = time.monotonic()
                for block in answer.iter_content(1 << 11) if result.size_fits else ():
                    result.bytes += len(block)
                    if result.bytes >= 8 << 20 or time.monotonic() - result.start > 3:  # past TCP's slow start
                        break
        except (requests.RequestException, OSError, ValueError):
            pass  # what came before the error counts
        finally:
            result.end = time.monotonic()
            ended.release()

    for url, result in samples.items():
        threading.Thread(target=request_sample, args=(url, result), daemon=True).start()
    for _ in urls:
        if not ended.acquire(timeout=max(deadline - time.monotonic(), 0)):
            break
        if any(result.end and result.bytes_per_second() >= enough for result in samples.values()):
            break
    return max((result.bytes_per_second() for result in samples.values()), default=0.0)
