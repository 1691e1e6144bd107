"""The HTTP half: GraphQL, file stream, storage, and faults."""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import random
import re
import socket
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from helpers.protocol import exports
from helpers.protocol.artifacts import Store
from helpers.protocol.graph import Root, answer
from helpers.protocol.world import Run, Sweep, World


@dataclass
class Fault:
    """What goes wrong: `slow` (value: seconds before each answer), `status` (429, 500, ...), `hang` (no answer while the
    fault lasts), `drop` (the connection is closed in the middle of the answer), `lose` (file stream: "thank you", and the rows
    are forgotten). For `times` requests whose name (a GraphQL
    operation, `file_stream`, `storage`, `parquet`) holds `where`."""

    kind: Literal["slow", "status", "hang", "drop", "lose"]
    value: float = 0
    where: str = ""
    times: float = float("inf")
    met: int = 0


@dataclass
class Request:
    """One request, as it was answered."""

    name: str
    method: str
    path: str
    began: float
    status: int = 0
    body: Any = field(default=None, repr=False)


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    owner: Server


class Server:
    """The server. `runs`, `sweeps` and `agents` are its state, which outlives `die` and `revive`."""

    key = "0123456789abcdef" * 3

    def __init__(self, entity: str = "me") -> None:
        self.world = World(entity)
        self.artifacts = self.world.artifacts = Store()
        self.runs, self.sweeps, self.agents = self.world.runs, self.world.sweeps, self.world.agents
        self.fault: Fault | None = None
        self.unknown: list[str] = []  # what was asked and is not known here
        self.requests: list[Request] = []
        self._lifted = threading.Condition()
        self._sockets: set[socket.socket] = set()
        self._port = 0
        self._http: _Listener | None = None
        self.revive()

    # -- life --

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def environment(self) -> dict[str, str]:
        """What a client's process needs to come here, and nowhere else."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": self.key, "WANDB_ERROR_REPORTING": "false"}

    def die(self) -> None:
        """Gone, with every connection; the state stays."""
        if self._http is None:
            return
        http, self._http = self._http, None
        http.shutdown()
        with contextlib.suppress(OSError):
            http.socket.shutdown(socket.SHUT_RDWR)  # a process that is just being started may hold it too, and would listen on
        http.server_close()
        for each in list(self._sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        with self._lifted:
            self._lifted.notify_all()

    def revive(self) -> None:
        """Back, at the same address."""
        if self._http is None:
            _Listener.allow_reuse_address = True
            self._http = self._listen()
            self._http.owner = self
            self._port = self._http.server_port
            threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def _listen(self) -> _Listener:
        # Below the ports that clients are given: a client that knocks at a dead server's port there may connect to itself.
        ports = [self._port] * 50 if self._port else random.sample(range(20_000, 32_000), 50)
        for port in ports:
            try:
                return _Listener(("127.0.0.1", port), _Handler)
            except OSError:
                time.sleep(0.1 if self._port else 0.0)
        raise OSError(f"no port to listen at: {ports[-1]} is in use")

    def heal(self) -> None:
        """No more faults; who hangs is answered."""
        self.fault = None
        with self._lifted:
            self._lifted.notify_all()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.heal()
        self.die()

    # -- what a test asks --

    def assert_understood(self) -> None:
        assert not self.unknown, "the client asked what this server was not taught:\n" + "\n---\n".join(self.unknown)

    def asked(self, name: str) -> list[Request]:
        return [request for request in self.requests if request.name == name]

    def only_sweep(self) -> Sweep:
        (sweep,) = self.sweeps.values()
        return sweep

    def export(self, run_id: str, rows: int | None = None) -> None:
        """Move the first rows of a run's history to a parquet file, as W&B does some time after they arrived."""
        run = self.runs[run_id]
        run.exported = len(run.history_lines) if rows is None else rows

    # -- answers --

    def misfortune(self, name: str, handler: _Handler) -> bool:
        """Let the fault happen to this request. True if it has had its answer."""
        fault = self.fault
        if fault is None or fault.where not in name or fault.met >= fault.times:
            return False
        fault.met += 1
        if fault.kind == "slow":
            time.sleep(fault.value)
        elif fault.kind == "hang":
            with self._lifted:
                self._lifted.wait_for(lambda: self.fault is not fault or self._http is None)
        elif fault.kind == "lose":
            self.world.has_lost_rows = True
            handler.send(200, {"exitcode": None, "limits": {}})
        elif fault.kind == "drop":
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{")
            handler.wfile.flush()
            handler.connection.shutdown(socket.SHUT_RDWR)
            handler.close_connection = True
        else:
            handler.send(int(fault.value), {"error": f"fault {int(fault.value)}"}, {"Retry-After": "1"})
        return fault.kind in ("status", "drop", "lose") or self._http is None

    def graphql(self, body: dict[str, Any]) -> tuple[int, Any]:
        status, found, strange = answer(Root(self.world, self.url), body["query"], body.get("variables") or {})
        if strange:
            self.unknown.append(strange)
        return status, found

    def file_stream(self, place: list[str], body: dict[str, Any]) -> tuple[int, Any]:
        with self.world.lock:
            run = self.world.run(place[0], place[1], place[2])
            if run is None:
                return 404, {"error": f"run {'/'.join(place)} not found"}
            run.beat = time.time()
            for name, chunk in (body.get("files") or {}).items():
                self._chunk(run, name, chunk["offset"], chunk["content"])
            run.preempting = run.preempting or bool(body.get("preempting"))
            if body.get("complete") or "exitcode" in body:
                self.world.end(run, int(body.get("exitcode", 0)))
            if strange := set(body) - {"files", "complete", "exitcode", "uploaded", "preempting", "dropped"}:
                self.unknown.append(f"file stream: {strange}")
            return 200, {"exitcode": None, "limits": {}, "stopped": run.stop_asked}

    def _chunk(self, run: Run, name: str, offset: int, lines: list[str]) -> None:
        kept = {"wandb-history.jsonl": run.history_lines, "wandb-events.jsonl": run.event_lines, "output.log": run.log_lines}
        if name == "wandb-summary.json":
            run.summary = json.loads(lines[-1])
        elif name in kept:
            if name == "wandb-history.jsonl" and offset > len(kept[name]) and not self.world.has_lost_rows:
                self.unknown.append(f"run {run.id}: history rows {offset}.. sent where there are {len(kept[name])}")
            kept[name][offset : offset + len(lines)] = lines
        else:
            self.unknown.append(f"file stream: {name}")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Listener

    def setup(self) -> None:
        super().setup()
        self.server.owner._sockets.add(self.connection)

    def finish(self) -> None:
        self.server.owner._sockets.discard(self.connection)
        with contextlib.suppress(OSError):
            super().finish()

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            super().handle()

    def log_message(self, *_: object) -> None: ...

    def send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream" if isinstance(content, bytes) else "application/json")
        self.send_header("Content-Length", str(len(raw)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def _serve(self) -> None:
        owner = self.server.owner
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if parts == ["graphql"]:
            body = json.loads(body)
            named = re.search(r"(?:query|mutation)\s+(\w+)", body["query"])
            name = named[1] if named else "graphql"
        else:
            name = parts[-1] if parts[-1] == "file_stream" else parts[0]
            body = json.loads(body) if name == "file_stream" else body
        request = Request(
            name, self.command, self.path, time.time(), body=body if name not in ("storage", "artifact_files") else None
        )
        owner.requests.append(request)
        if owner.misfortune(name, self):
            return
        request.status, content = self._answer(owner, name, parts, body)
        if request.status:
            self.send(request.status, content)

    def _answer(self, owner: Server, name: str, parts: list[str], body: Any) -> tuple[int, Any]:
        if parts == ["graphql"]:
            return owner.graphql(body)
        if name == "file_stream":
            return owner.file_stream(parts[1:4], body)
        run = owner.world.run(*parts[1:4]) if name == "storage" and len(parts) > 4 else None
        if run and self.command == "PUT":
            run.files["/".join(parts[4:])] = body
            return 200, {}
        if run and "/".join(parts[4:]) in run.files:
            return 200, run.files["/".join(parts[4:])]
        if name == "artifact_files":
            return self._artifact_file(owner, parts[1], base64.urlsafe_b64decode(parts[2]).decode(), body)
        if name == "parquet":
            run = owner.runs[parts[1].removesuffix(".parquet")]
            return self._ranged(exports.parquet(run.history_lines[: run.exported]))
        if parts == ["healthz"]:
            return 200, {}
        owner.unknown.append(f"{self.command} {self.path}\n{body!r:.500}")
        return 404, {"error": "not here"}

    def _artifact_file(self, owner: Server, entity: str, md5: str, body: Any) -> tuple[int, Any]:
        with owner.world.lock:
            if self.command == "PUT":
                return (200, {}) if owner.artifacts.upload(entity, md5, body) else (400, {"error": "another MD5"})
            content = owner.artifacts.content.get((entity, md5))
        return (404, {"error": "not here"}) if content is None else self._ranged(content)

    def _ranged(self, content: bytes) -> tuple[int, Any]:
        """A piece of a file, where one is asked for."""
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if not asked:
            return 200, content
        start = int(asked[1]) if asked[1] else len(content) - int(asked[2])
        end = min(len(content), int(asked[2]) + 1 if asked[1] and asked[2] else len(content))
        where = {"Content-Range": f"bytes {start}-{end - 1}/{len(content)}", "Accept-Ranges": "bytes"}
        self.send(206, content[start:end], where)
        return 0, None

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = _serve
