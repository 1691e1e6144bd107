"""As much of a W&B server as wandb 0.31 needs to create, resume and fill one run."""

from __future__ import annotations

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer:
    """`rows` as they arrived, without W&B's own keys and media; `refusing` answers 401 to everything."""

    def __init__(self, *, refusing: bool = False) -> None:
        self.rows: list[dict[str, Any]] = []
        self.exit_codes: list[int] = []
        self._tail: list[str] = []
        self._bucket: dict[str, Any] | None = None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
                answer = {} if refusing else outer._answer(self.path, json.loads(body or b"{}"))
                content = json.dumps(answer).encode()
                self.send_response(401 if refusing else 200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, path: str, request: dict[str, Any]) -> dict[str, Any]:
        if "file_stream" in path:
            return self._stream(request)
        query, variables = request.get("query", ""), request.get("variables") or {}
        project = {"id": "p", "name": "cifar", "entity": {"id": "e", "name": "me"}}
        if "RunResumeStatus" in query:
            known = {"historyLineCount": len(self.rows), "historyTail": json.dumps(self._tail[-1:])}
            return {"data": {"model": {**project, "bucket": self._bucket and {**self._bucket, **known}}}}
        if "UpsertBucket" in query:
            counts = {"eventsLineCount": 0, "logLineCount": 0, "eventsTail": "[]", "summaryMetrics": "{}", "config": "{}"}
            names = {"id": "x", "name": variables.get("name"), "displayName": "n", "notes": "", "tags": [], "sweepName": None}
            self._bucket = {**names, **counts, "wandbConfig": '{"t": {"1": 1}}', "project": project}
            return {"data": {"upsertBucket": {"bucket": {**self._bucket, "historyLineCount": 0}, "inserted": True}}}
        return {"data": {}, "errors": [{"message": "not here"}]}

    def _stream(self, request: dict[str, Any]) -> dict[str, Any]:
        history = (request.get("files") or {}).get("wandb-history.jsonl", {"offset": 0, "content": []})
        for offset, line in enumerate(history["content"], history["offset"]):
            row = {key: value for key, value in json.loads(line).items() if key[0] != "_" and not key.startswith("pictures/")}
            self.rows[offset : offset + 1] = [row]
            self._tail.append(line)
        if "exitcode" in request:
            self.exit_codes.append(request["exitcode"])
        return {}
