"""A chat endpoint on this machine, for tests of judges."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = str | int | bytes | None
"""Text of a chat completion, an HTTP status, a raw body, or None: hang up without a word."""


class FakeEndpoint:
    """Answers with `reply(number of the request, its body)`; keeps what it was asked."""

    def __init__(self, reply: Callable[[int, dict[str, Any]], Answer]) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.reply = reply
        self.url = ""


@contextmanager
def serving(reply: Callable[[int, dict[str, Any]], Answer]) -> Iterator[FakeEndpoint]:
    fake = FakeEndpoint(reply)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            fake.bodies.append(body)
            fake.headers.append(dict(self.headers))
            fake.paths.append(self.path)
            answer = fake.reply(len(fake.bodies) - 1, body)
            if answer is None:
                self.close_connection = True
                return
            status = answer if isinstance(answer, int) else 200
            data = (
                answer
                if isinstance(answer, bytes)
                else json.dumps({"choices": [{"message": {"role": "assistant", "content": answer}}]}).encode()
            )
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    fake.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
