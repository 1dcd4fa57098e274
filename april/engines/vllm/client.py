"""The HTTP side of a vLLM server engine: a thread with an event loop that turns streams and calls into news.

    generate, abort, update -->  event loop: one stream a sample, calls in order  --> news (chunk, broken, updated, lost)

Whoever polls reads the news; `fileno` can be read when there are any. Nothing here waits for the server but the few questions
of a start, and nothing here decides what becomes of a sample.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import deque
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import httpx2

from april.core.errors import EngineError, ProcessError
from april.engines.vllm.wire import PREFIX, Chunk, Garbage, Usage, parse

_CONNECT_S = 10.0
_HEALTH_S = 5.0
_UNIX = "unix:"


class Broke(NamedTuple):
    """Nothing more comes of a request."""

    key: str
    reason: str


class Updated(NamedTuple):
    """The calls of an update were all made."""


class Lost(NamedTuple):
    """The server is of no more use."""

    reason: str


News = Chunk | Usage | Broke | Updated | Lost
Step = tuple[str, dict[str, Any], dict[str, Any] | None]
"""Path, query and JSON body of a POST."""


class Client:
    """Speaks to one server.

    Args:
        url: "http://host:port", or "unix:/path/of/socket".
        api_key: sent as bearer token.
        vocab_size: tokens are below it.
    """

    def __init__(self, url: str, *, api_key: str | None, vocab_size: int) -> None:
        self.url, self._vocab_size = url, vocab_size
        self._news: deque[News] = deque()
        self._readable, self._writable = os.pipe()
        os.set_blocking(self._readable, False)
        os.set_blocking(self._writable, False)
        self.heard_s = time.monotonic()
        """When the server last sent anything of a sample."""
        self._streams: dict[str, asyncio.Task[None]] = {}
        self._loop = asyncio.new_event_loop()
        self._http = _http(url, api_key)
        self._thread = threading.Thread(target=self._loop.run_forever, name="april-vllm-client", daemon=True)
        self._thread.start()

    # -- called by the engine -------------------------------------------------------------------------------------

    def fileno(self) -> int:
        """Can be read when there are news."""
        return self._readable

    def news(self) -> list[News]:
        """What has come since the last call, in order."""
        with suppress(BlockingIOError):
            os.read(self._readable, 1 << 16)
        found: list[News] = []
        while self._news:
            found.append(self._news.popleft())
        return found

    def generate(self, key: str, body: dict[str, Any], entropies: int | None) -> None:
        """Begin a stream; its chunks and its end are news."""
        self._do(self._begin(key, body, entropies))

    def abort(self, keys: Sequence[str]) -> None:
        """Ask the server to end these requests; their streams then end by themselves."""
        self._do(self._abort([PREFIX + key for key in keys]))

    def update(self, steps: Sequence[Step]) -> None:
        """Make these calls, one after the other; news tell when the last is done."""
        self._do(self._update(steps))

    def ask(self, path: str, query: dict[str, Any] | None = None) -> Any:
        """The JSON answer to a GET, or None where there is none; waits for it."""

        async def get() -> Any:
            reply = await self._http.get(path, params=query, timeout=_CONNECT_S)
            return (reply.json() if reply.content else {}) if reply.status_code == 200 else None

        try:
            return asyncio.run_coroutine_threadsafe(get(), self._loop).result()
        except (httpx2.HTTPError, ValueError):
            return None

    def call(self, steps: Sequence[Step]) -> None:
        """Make these calls and wait for them.

        Raises:
            ProcessError: one of them fails.
        """
        try:
            asyncio.run_coroutine_threadsafe(self._steps(steps), self._loop).result()
        except httpx2.HTTPError as error:
            raise ProcessError("a vLLM server does not take a call", where=self.url, got=_told(error)) from error

    def close(self) -> None:
        """End all streams and the thread."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._shut(), self._loop).result(_CONNECT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CONNECT_S)
        self._loop.close()
        os.close(self._readable)
        os.close(self._writable)

    # -- on the event loop ----------------------------------------------------------------------------------------

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop)

    def _tell(self, news: News) -> None:
        self._news.append(news)
        with suppress(BlockingIOError):
            os.write(self._writable, b"!")

    async def _begin(self, key: str, body: dict[str, Any], entropies: int | None) -> None:
        self._streams[key] = asyncio.create_task(self._stream(key, body, entropies))

    async def _stream(self, key: str, body: dict[str, Any], entropies: int | None) -> None:
        try:
            reason = await self._read(key, body, entropies)
        except EngineError as error:
            reason = f"{error.what}: {error.got}"
        except Garbage as error:
            reason = f"the server sent garbage: {error}"
        except httpx2.HTTPError as error:
            reason = f"the connection broke: {_told(error)}"
        except Exception as error:  # nobody else would tell what became of the sample
            reason = f"its stream could not be read: {_told(error)}"
        finally:
            self._streams.pop(key, None)
        if reason is None:
            return
        problem = await self._health()
        self._tell(Broke(key, reason) if problem is None else Lost(f"{reason}; {problem}"))

    async def _read(self, key: str, body: dict[str, Any], entropies: int | None) -> str | None:
        """Read one stream; returns what is wrong with its end."""
        finished = False
        async with self._http.stream("POST", "/inference/v1/generate", json=body) as reply:
            if reply.status_code != 200:
                return f"the server refused it: {reply.status_code} {(await reply.aread())[:300].decode(errors='replace')}"
            async for line in reply.aiter_lines():
                self.heard_s = time.monotonic()
                if line == "data: [DONE]":
                    break
                found = parse(line, key, vocab_size=self._vocab_size, entropies=entropies)
                if found is not None:
                    finished = finished or (isinstance(found, Chunk) and found.finish is not None)
                    self._tell(found)
        return None if finished else "the stream ended before the sample"

    async def _health(self) -> str | None:
        """What is wrong with the server; None when it answers."""
        try:
            reply = await self._http.get("/health", timeout=_HEALTH_S)
        except httpx2.HTTPError as error:
            return f"the server does not answer ({_told(error)})"
        return None if reply.status_code == 200 else f"the server is not well ({reply.status_code})"

    async def _abort(self, ids: list[str]) -> None:
        with suppress(httpx2.HTTPError):  # the streams tell if the server is gone; what still runs is aborted again
            await self._http.post("/abort_requests", json={"request_ids": ids}, timeout=_CONNECT_S)

    async def _update(self, steps: Sequence[Step]) -> None:
        try:
            await self._steps(steps)
        except httpx2.HTTPError as error:
            self._tell(Lost(f"it did not take new weights: {_told(error)}"))
        else:
            self.heard_s = time.monotonic()
            self._tell(Updated())

    async def _steps(self, steps: Sequence[Step]) -> None:
        for path, query, body in steps:
            reply = await self._http.post(path, params=query, json=body)
            if reply.status_code != 200:
                told = f"{path}: {reply.status_code} {reply.text[:300]}"
                raise httpx2.HTTPStatusError(told, request=reply.request, response=reply)

    async def _shut(self) -> None:
        tasks = list(self._streams.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._http.aclose()


def _http(url: str, api_key: str | None) -> httpx2.AsyncClient:
    """Any number of connections, one for each sample; silence is judged by the engine, for all samples together."""
    unlimited = httpx2.Limits(max_connections=None, max_keepalive_connections=64)
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    options: dict[str, Any] = {"headers": headers, "timeout": httpx2.Timeout(None, connect=_CONNECT_S), "trust_env": False}
    if url.startswith(_UNIX):
        transport = httpx2.AsyncHTTPTransport(uds=url.removeprefix(_UNIX), limits=unlimited)
        return httpx2.AsyncClient(transport=transport, base_url="http://vllm", **options)
    return httpx2.AsyncClient(base_url=url, limits=unlimited, **options)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")
