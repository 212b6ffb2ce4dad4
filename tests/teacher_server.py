"""A stand-in for `vllm serve` on loopback: a teacher of one distribution, and a person who decides how it behaves."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

NAME = "tiny-teacher"
LOGP = [math.log(p) for p in (0.5, 0.25, 0.125, 0.0625, 0.0625)]  # of tokens 0 to 4, at every place
MOST = 4  # of prompt_logprobs

Reply = tuple[int, Any]  # status, and what becomes JSON


def entry(token: int) -> dict[str, Any]:
    """Tokens behind the fifth have next to nothing."""
    logp = LOGP[token] if token < len(LOGP) else -40.0
    return {"logprob": logp, "rank": token + 1, "decoded_token": f"<{token}>"}


@dataclass
class TeacherServer:
    """`before` may answer a request in the server's place: None lets it go on."""

    tokenize: Callable[[str], list[int]] = lambda text: [ord(letter) % 5 for letter in text]
    before: Callable[[dict[str, Any]], Reply | None] = lambda body: None
    max_model_len: int | None = 64
    key: str | None = None
    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    under_way: int = 0
    most_under_way: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, path: str, body: dict[str, Any], headers: Any) -> Reply:
        if self.key is not None and headers["Authorization"] != f"Bearer {self.key}":
            return 401, {"error": "Unauthorized"}
        if path == "/v1/models":
            return 200, {"data": [{"id": NAME, "max_model_len": self.max_model_len}]}
        self.asked.append(body)
        if (reply := self.before(body)) is not None:
            return reply
        if (count := body.get("prompt_logprobs", 0)) > MOST:
            return 400, {"error": {"message": f"Requested prompt logprobs of {count}, which is greater than max"}}
        ids = body["prompt"] if isinstance(body["prompt"], list) else self.tokenize(body["prompt"])
        said = [{str(token): entry(token) for token in {own, *range(count)}} for own in ids]
        choice = {"prompt_logprobs": [None, *said[1:]], "prompt_token_ids": ids, "token_ids": [3, 2]}
        return 200, {"choices": [choice]}


@contextmanager
def serving(teacher: TeacherServer, port: int = 0) -> Iterator[TeacherServer]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
            with teacher.lock:
                teacher.under_way += 1
                teacher.most_under_way = max(teacher.most_under_way, teacher.under_way)
            status, content = teacher.answer(self.path, body, self.headers)
            with teacher.lock:
                teacher.under_way -= 1
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_GET

        def log_message(self, *args: Any) -> None: ...

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        allow_reuse_address = True

        def handle_error(self, *args: Any) -> None:
            """A client that has gone away."""

    with Server(("127.0.0.1", port), Handler) as server:
        teacher.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield teacher
        finally:
            server.shutdown()
            thread.join()
