"""Small archives in CIFAR-10's form, and a server on the loopback that can misbehave."""

from __future__ import annotations

import hashlib
import http.server
import io
import pickle
import re
import tarfile
import threading
import time
from typing import ClassVar

import numpy as np

from cifar.data import cifar10


def batch_bytes(count: int = 3, **changes: object) -> bytes:
    """As Python 2 wrote the official files: protocol 2, byte-string keys."""
    data = np.arange(count * 3072, dtype=np.uint64).astype(np.uint8).reshape(count, 3072)
    return python2_pickle(
        {b"data": data, b"labels": [i % 10 for i in range(count)], **{k.encode(): v for k, v in changes.items()}}
    )


def python2_pickle(batch: dict[bytes, object]) -> bytes:
    """Protocol 2 with Python 2's byte strings (opcode T), which Python 3 no longer writes."""

    class Pickler(pickle._Pickler):
        def save_bytes(self, content: bytes) -> None:
            self.write(b"T" + len(content).to_bytes(4, "little") + content)
            self.memoize(content)

        dispatch: ClassVar = {**pickle._Pickler.dispatch, bytes: save_bytes}

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump(batch)
    return buffer.getvalue()


def archive_bytes(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


BATCH_NAMES = [f"{cifar10.FOLDER}/{name}" for name in cifar10.BATCHES]
NOISE = np.random.default_rng(0).bytes(400_000)
SMALL = archive_bytes({**{name: batch_bytes() for name in BATCH_NAMES}, "noise": NOISE})


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` at every path. Set the attributes to make it behave badly."""

    daemon_threads = True

    def __init__(self, content: bytes = SMALL) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.requests = content, list[str]()
        self.drop_after, self.knows_range, self.status, self.bytes_per_second = 0, True, 0, 0.0
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def server_close(self) -> None:
        self.shutdown()  # else its thread polls a closed socket, without a pause, as long as the tests run
        super().server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{cifar10.ARCHIVE}"

    def handle_error(self, *_: object) -> None:
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        server, asked = self.server, self.headers.get("Range", "")
        server.requests.append(asked)
        if server.status:
            return self.send_error(server.status)
        match = re.match(r"bytes=(\d+)-", asked) if server.knows_range else None
        start, total = int(match[1]) if match else 0, len(server.content)
        if start >= total:
            return self.send_error(416)
        self.send_response(206 if match else 200)
        if match:
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        self.send_header("Content-Length", str(total - start))
        self.end_headers()
        rest = server.content[start:]
        if server.drop_after:
            rest = rest[: server.drop_after]
        if server.bytes_per_second:
            for at in range(0, len(rest), 4096):
                self.wfile.write(rest[at : at + 4096])
                time.sleep(4096 / server.bytes_per_second)
        else:
            self.wfile.write(rest)
        return None
