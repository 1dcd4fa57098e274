"""A server that answers like vLLM 0.32, and can be told to fail: for what a real one does not do on demand."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

CHUNK_TOKENS = 4
SERVED = {
    "model_config": {"logprobs_mode": "processed_logprobs", "max_model_len": 128, "dtype": "torch.float32"},
    "cache_config": {"num_gpu_blocks": 17, "block_size": 32, "enable_prefix_caching": True},
    "scheduler_config": {"max_num_seqs": 8, "policy": "priority"},
    "weight_transfer_config": {"backend": "april"},
}


class FakeVllm:
    """Serves until closed.

    Attributes:
        served: what it says of itself.
        faults: by the number of the generate request: garbage, infinite, half, unended, refused, error, hang, elsewhere,
            unversioned, short (of versions) or die.
        waits: requests that stop after their first tokens until they are aborted, or the server is resumed.
        calls: paths of all POSTs but generate, with their bodies.
        bodies: of the generate requests.
        version: of its weights.
    """

    def __init__(self) -> None:
        self.served: dict[str, Any] = json.loads(json.dumps(SERVED))
        self.faults: dict[int, str] = {}
        self.waits: set[int] = set()
        self.calls: list[tuple[str, Any]] = []
        self.bodies: list[dict[str, Any]] = []
        self.version = "default"
        self.aborted: set[str] = set()
        self.changed = threading.Condition()
        self.num_resumes = 0
        self.closing = False
        self.well = True
        handler = type("Handler", (_Handler,), {"fake": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        with self.changed:
            self.closing = True
            self.changed.notify_all()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def called(self, path: str, body: Any) -> None:
        with self.changed:
            self.calls.append((path.split("?")[0], body))
            if path.startswith("/finish_weight_update"):
                self.version = body["weight_version"]
            if path.startswith("/abort_requests"):
                self.aborted |= {name.removeprefix("generate-tokens-") for name in body["request_ids"]}
            self.num_resumes += path.startswith("/resume")
            self.changed.notify_all()

    def until(self, ready: Callable[[], bool]) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.closing or ready())

    def stream(self, number: int, body: dict[str, Any]) -> Iterator[str]:
        """The lines of one request: token i of the response is 2 + i, its log-prob -(i + 1) / 100."""
        fault, at, total = self.faults.get(number), len(body["token_ids"]), int(body["sampling_params"]["max_tokens"])
        spans = [{"version": "elsewhere" if fault == "elsewhere" else self.version, "start": 0, "end": total}]
        for start in range(0, total, CHUNK_TOKENS):
            end = min(start + CHUNK_TOKENS, total)
            if start and number in self.waits:
                self.until(partial(self._let_go, body["request_id"], self.num_resumes))
                if body["request_id"] in self.aborted:
                    yield _line([], at, "abort", [{**spans[0], "end": start}])
                    break
                self.waits.discard(number)
                spans = [{**spans[0], "end": start}, {"version": self.version, "start": start, "end": total}]
            if start and fault is not None:
                yield from self._fault(fault)
            told = {"unversioned": [], "short": spans[:-1]}.get(fault or "", spans)
            yield _line(list(range(start, end)), at, "length" if end == total else None, told if end == total else None)
        usage = {"prompt_tokens": at, "prompt_tokens_details": {"cached_tokens": at // 2}}
        yield json.dumps({"choices": [], "usage": usage})

    def _let_go(self, request: str, num_resumes: int) -> bool:
        return request in self.aborted or self.num_resumes > num_resumes

    def _fault(self, fault: str) -> Iterator[str]:
        if fault == "hang":
            self.until(lambda: False)
        elif fault == "die":
            self.well = False
            raise ConnectionAbortedError
        elif fault == "half":
            raise ConnectionAbortedError
        elif fault == "garbage":
            yield json.dumps({"choices": [{"token_ids": [3], "logprobs": {"content": [{"token_id": 3, "logprob": 7.0}]}}]})
        elif fault == "infinite":
            yield json.dumps({"choices": [{"token_ids": [float("inf")]}]})
        elif fault == "error":
            yield json.dumps({"error": {"message": "out of luck", "code": 500}})


def _line(indices: list[int], at: int, finish: str | None, spans: Any) -> str:
    content = [{"token_id": 2 + i % 40, "logprob": -(i + 1) / 100, "top_logprobs": []} for i in indices]
    choice = {
        "token_ids": [entry["token_id"] for entry in content],
        "logprobs": {"content": content},
        "finish_reason": finish,
        "weight_versions": spans,
    }
    return json.dumps({"choices": [choice]})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: FakeVllm

    def log_message(self, *args: Any) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        known = {"/health": {}, "/server_info": {"vllm_config": self.fake.served}}
        found = known.get(self.path.split("?")[0])
        self._answer(404 if found is None or not self.fake.well else 200, found or {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"null")
        if self.path != "/inference/v1/generate":
            self.fake.called(self.path, body)
            self._answer(200, {})
            return
        with self.fake.changed:
            number = len(self.fake.bodies)
            self.fake.bodies.append(body)
        if self.fake.faults.get(number) == "refused":
            self._answer(400, {"error": "no"})
            return
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with suppress(ConnectionError):
            for line in self.fake.stream(number, body):
                self._chunk(f"data: {line}\n\n")
                if self.fake.faults.get(number) == "unended":
                    break
            self._chunk("data: [DONE]\n\n")
            self._chunk("")
            return
        self.close_connection = True

    def _chunk(self, text: str) -> None:
        self.wfile.write(f"{len(text):x}\r\n{text}\r\n".encode())
        self.wfile.flush()

    def _answer(self, code: int, body: Any) -> None:
        text = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
