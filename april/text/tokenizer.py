"""A Hugging Face tokenizer behind the five calls that a run needs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from april.core.errors import ModelError
from april.core.prompt import Tokens, frozen_array


class Tokenizer:
    """Text to token ids and back.

    Args:
        backend: a fast tokenizer of `transformers`.
        eos_ids: every token that ends a response.
        where: folder or hub name, for messages.

    Raises:
        ModelError: for a slow tokenizer, or one that has no end-of-sequence token.
    """

    def __init__(self, backend: Any, eos_ids: Iterable[int] = (), where: str = "tokenizer") -> None:
        if not getattr(backend, "is_fast", False):
            raise ModelError(
                "a slow tokenizer cannot be used", where=where, got=type(backend).__name__, expected="a tokenizer.json"
            )
        own = () if backend.eos_token_id is None else (int(backend.eos_token_id),)
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys((*own, *(int(i) for i in eos_ids))))
        if not self.eos_ids:
            raise ModelError(
                "a tokenizer has no end-of-sequence token, so no response could end",
                where=where,
                got="no eos_token",
                expected="`eos_token` in tokenizer_config.json, or `eos_token_id` in generation_config.json",
                hint='set it in the model folder, such as "eos_token": "</s>" in tokenizer_config.json',
            )
        self._backend, self.where = backend, where

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a tokenizer from a model folder, or by hub name from the local cache or the network.

        Raises:
            ModelError: when there is none at `path`, or it cannot be used.
        """
        from transformers import AutoTokenizer

        if not Path(path).exists() and (Path(path).is_absolute() or str(path).startswith(".")):
            raise ModelError("a model folder does not exist", where=str(path), expected="a folder with tokenizer.json")
        try:
            backend = AutoTokenizer.from_pretrained(str(path))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(
                "a tokenizer cannot be loaded",
                where=str(path),
                got=str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__,
                expected="a folder with tokenizer.json and tokenizer_config.json, or the name of a model on the hub",
                hint="check model.path; without a network only folders and models that were loaded before can be used",
            ) from error
        return cls(backend, _generation_eos_ids(str(path)), str(path))

    @property
    def pad_id(self) -> int:
        """The padding token; the first end-of-sequence token where the tokenizer has none."""
        return self.eos_ids[0] if self._backend.pad_token_id is None else int(self._backend.pad_token_id)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return len(self._backend)

    @property
    def backend(self) -> Any:
        """The tokenizer of `transformers`, to be saved beside a model."""
        return self._backend

    def encode(self, text: str) -> Tokens:
        """int32 (T,): the tokens of `text`, nothing added; special tokens written in the text are recognised."""
        return frozen_array(self._backend.encode(text, add_special_tokens=False), np.int32)

    def decode(self, token_ids: npt.ArrayLike, *, keep_special: bool = False) -> str:
        """The text of `token_ids`; without special tokens such as end-of-sequence unless `keep_special`."""
        ids = np.asarray(token_ids, np.int64).tolist()
        text = self._backend.decode(ids, skip_special_tokens=not keep_special, clean_up_tokenization_spaces=False)
        return str(text)

    def render(self, messages: str | Sequence[Mapping[str, str]], *, chat: bool = False) -> str:
        """The text that the model reads: `messages` itself, or put through the chat template up to the assistant's turn.

        Args:
            messages: a text (one user turn where `chat`), or turns of {"role", "content"}, which need `chat`.
            chat: whether the tokenizer's chat template is applied.

        Raises:
            ModelError: when `chat` is asked of a tokenizer without a chat template, or turns are given without `chat`.
        """
        if not chat:
            if not isinstance(messages, str):
                raise ModelError("turns of a conversation need a chat template", where=self.where, hint="set chat = true")
            return messages
        if not self._backend.chat_template:
            raise ModelError(
                "a tokenizer has no chat template",
                where=self.where,
                expected="`chat_template`",
                hint="set chat = false for plain text",
            )
        turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else [dict(turn) for turn in messages]
        return str(self._backend.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))

    def round_trip(self, texts: Iterable[str]) -> list[str]:
        """Those of `texts` that do not survive encoding and decoding."""
        return [text for text in texts if self.decode(self.encode(text), keep_special=True) != text]


def _generation_eos_ids(path: str) -> tuple[int, ...]:
    """The end-of-sequence tokens of generation_config.json, which lists more than the tokenizer does for chat models."""
    file = Path(path) / "generation_config.json"
    if not Path(path).is_dir():
        from transformers.utils.hub import cached_file

        found = cached_file(path, "generation_config.json", _raise_exceptions_for_missing_entries=False)
        if found is None:
            return ()
        file = Path(found)
    if not file.is_file():
        return ()
    try:
        value = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise ModelError(
            "a generation config cannot be read", where=str(file), got=str(error), expected="a JSON object"
        ) from error
    return tuple(value) if isinstance(value, list) else () if value is None else (value,)
