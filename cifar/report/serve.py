"""The report page of runs that are still going on, served to this machine's own browser: it follows the runs.

The page is the same as the file. It asks every few seconds whether the runs have changed, and loads itself again if so; what
the reader has chosen is in its address, and stays. It asks for the details of any run, too.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from cifar.errors import UserError
from cifar.report.build import ReportResult, write_report
from cifar.report.explorer.document import describe_details
from cifar.system.names import is_id

MIN_SECONDS = 2.0  # between two drawings of the page
STATE_FILES = ("metrics.jsonl", "status.json", "summary.json", "run.json")


class ReportServer:
    """Serves the page on the loopback interface. `serve` returns when `stop` was called, or raises KeyboardInterrupt.

    `write`: writes the report into a folder, like `write_report`.
    """

    def __init__(self, runs: Path, write: Callable[[Path], ReportResult], port: int = 0) -> None:
        self.runs, self._write = runs, write
        self._lock = threading.Lock()
        self._folder = tempfile.TemporaryDirectory(prefix="cifar-report-")
        self._page, self._stamp, self._drawn = b"", "", 0.0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer._answer(self)

            def log_message(self, *_: object) -> None: ...

        try:
            self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        except OSError as error:
            raise UserError(f"--serve: port {port} cannot be used ({error.strerror}); take another one with --port") from None
        self._server.daemon_threads = True

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def serve(self) -> None:
        try:
            self._server.serve_forever()
        finally:
            self._server.server_close()
            self._folder.cleanup()

    def stop(self) -> None:
        self._server.shutdown()

    # -- answers --

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        # A page of another site may make the browser ask by a name that it has pointed to this machine.
        if request.headers.get("Host", "") not in (f"127.0.0.1:{self.port}", f"localhost:{self.port}"):
            _send(request, 403, b"only this machine's own browser is answered", "text/plain")
            return
        path = unquote(urlsplit(request.path).path)
        try:
            if path == "/":
                _send(request, 200, self._render(), "text/html; charset=utf-8")
            elif path == "/stamp":
                _send(request, 200, json.dumps(self._compute_stamp()).encode(), "application/json")
            elif path.startswith("/details/"):
                self._send_details(request, path.removeprefix("/details/"))
            else:
                _send(request, 404, b"there is nothing here", "text/plain")
        except UserError as error:
            _send(request, 503, str(error).encode(), "text/plain; charset=utf-8")

    def _send_details(self, request: BaseHTTPRequestHandler, run_id: str) -> None:
        from cifar.report.load import load_run

        folder = self.runs / run_id
        if not is_id(run_id) or not (folder / "run.json").is_file():
            _send(request, 404, b"no such run", "text/plain")
            return
        _send(request, 200, json.dumps(describe_details(load_run(folder)), allow_nan=False).encode(), "application/json")

    def _render(self) -> bytes:
        with self._lock:
            stamp = self._compute_stamp()
            if not self._page or (stamp != self._stamp and time.monotonic() - self._drawn > MIN_SECONDS):
                page = self._write(Path(self._folder.name)).page.read_bytes()
                self._page, self._stamp, self._drawn = serve_page(page, stamp), stamp, time.monotonic()
            return self._page

    def _compute_stamp(self) -> str:
        """A digest of which runs there are, and of the time and size of what they write."""
        digest = hashlib.sha256()
        for folder in sorted(self.runs.iterdir()) if self.runs.is_dir() else ():
            for name in STATE_FILES:
                with contextlib.suppress(OSError):
                    about = (folder / name).stat()
                    digest.update(f"{folder.name}/{name} {about.st_mtime_ns} {about.st_size}\n".encode())
        return digest.hexdigest()[:16]


def serve_page(page: bytes, stamp: str) -> bytes:
    """The page as a server sends it: it may ask this server, and knows which state of the runs it shows."""
    head, policy, rest = page.partition(b"default-src 'none';")
    return head.replace(b"<html ", f'<html data-served="{stamp}" '.encode(), 1) + policy + b" connect-src 'self';" + rest


def _send(request: BaseHTTPRequestHandler, status: int, content: bytes, kind: str) -> None:
    with contextlib.suppress(ConnectionError):
        request.send_response(status)
        request.send_header("Content-Type", kind)
        request.send_header("Content-Length", str(len(content)))
        request.send_header("Cache-Control", "no-store")
        request.send_header("X-Content-Type-Options", "nosniff")
        request.end_headers()
        request.wfile.write(content)


def serve_report(
    names: Sequence[str],
    runs: Path,
    port: int,
    *,
    split: str = "val",
    budget: float | None = None,
    cost_unit: str = "macs",
) -> ReportServer:
    """A server for `cifar report NAMES`, with the options of `write_report`."""

    def write(out: Path) -> ReportResult:
        return write_report(names, runs=runs, out=out, split=split, budget=budget, cost_unit=cost_unit)

    return ReportServer(runs, write, port)
