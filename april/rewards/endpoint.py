"""A language model behind HTTP, asked one question at a time with nothing but the standard library."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any, Protocol

RETRIED = frozenset({408, 429, 500, 502, 503, 504})
"""Answers of a server that may well do better a moment later."""
FIRST_PAUSE_S = 0.2


class Model(Protocol):
    """Answers a prompt with text; raises whatever goes wrong."""

    def __call__(self, prompt: str) -> str: ...


class EndpointFailed(RuntimeError):
    """The model gave no answer; the message says why in one line."""


@dataclass(frozen=True, slots=True)
class ChatEndpoint:
    """An OpenAI-compatible chat endpoint, as vLLM, SGLang and hosted services offer it.

    Attributes:
        url: up to the version, such as "http://127.0.0.1:8000/v1".
        model: name of the model there.
        api_key_env: environment variable that holds the key; the key itself is never kept.
        timeout_s: for each request.
        retries: further attempts after a timeout, a broken connection or a busy server; pauses double from 0.2 s.
        max_tokens, temperature: of the answer.
    """

    url: str
    model: str
    api_key_env: str | None = None
    timeout_s: float = 30.0
    retries: int = 1
    max_tokens: int = 1024
    temperature: float = 0.0

    def __call__(self, prompt: str) -> str:
        """The model's answer.

        Raises:
            EndpointFailed: no answer after all attempts.
        """
        for attempt in range(self.retries + 1):
            try:
                return self._ask(prompt)
            except urllib.error.HTTPError as error:
                with error:
                    reason = f"HTTP {error.code} from {self.url}"
                if error.code not in RETRIED:
                    break
            except (OSError, TimeoutError) as error:  # refused, reset, timed out, no such host
                reason = f"{self.url}: {getattr(error, 'reason', error)}"
            if attempt < self.retries:
                time.sleep(FIRST_PAUSE_S * 2**attempt)
        raise EndpointFailed(f"the judge did not answer: {reason}")

    def _ask(self, prompt: str) -> str:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
        }
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), self._headers(), method="POST"
        )
        with urllib.request.urlopen(request, timeout=self.timeout_s) as answer:
            return _content(answer.read())

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json"}
        if self.api_key_env is not None:
            key = os.environ.get(self.api_key_env)
            if not key:
                raise EndpointFailed(f"the environment variable {self.api_key_env} holds no key")
            headers["Authorization"] = f"Bearer {key}"
        return headers


def _content(data: bytes) -> str:
    """The text of a chat completion.

    Raises:
        EndpointFailed: it has another shape.
    """
    try:
        answer: Any = json.loads(data)
        content = answer["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError) as error:
        raise EndpointFailed(f"the judge sent no chat completion: {data[:80]!r}") from error
    if not isinstance(content, str):
        raise EndpointFailed(f"the judge sent no text: {str(content)[:80]!r}")
    return content
