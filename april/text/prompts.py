"""From items of a task to tokenised prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from april.core.errors import DataError, RecipeError
from april.core.prompt import Prompt, Tokens
from april.core.template import fill


class Encoder(Protocol):
    """What prompts need of a tokenizer."""

    def encode(self, text: str) -> Tokens: ...

    def render(self, messages: str | Sequence[Mapping[str, str]], *, chat: bool = False) -> str: ...


def build_prompts(
    items: Sequence[Mapping[str, Any]],
    tokenizer: Encoder,
    template: str = "{question}",
    *,
    chat: bool = False,
    system: str | None = None,
    max_prompt_tokens: int | None = None,
) -> list[Prompt]:
    """Tokenise each item once.

    Args:
        items: dicts with at least `id` and the fields of the template; each goes into its prompt for the reward.
        tokenizer: text to tokens.
        template: filled by `fill`.
        chat: whether the text becomes a user turn of the tokenizer's chat template.
        system: a system turn before it; only with `chat`.
        max_prompt_tokens: longest prompt that leaves room for a response in the context.

    Raises:
        RecipeError: for a template that does not fit the items, or `system` without `chat`.
        DataError: for a prompt that is empty or too long, an id that occurs twice, or no items at all.
    """
    if system is not None and not chat:
        raise RecipeError(
            "a system turn has no effect without a chat template", where="prompt.system", got=system, hint="set chat = true"
        )
    if not items:
        raise DataError(
            "a data set is empty", where="task", got="no items", expected="at least one item", hint="see the task's options"
        )
    return list(_prompts(items, tokenizer, template, chat, system, max_prompt_tokens))


def _prompts(
    items: Sequence[Mapping[str, Any]], tokenizer: Encoder, template: str, chat: bool, system: str | None, limit: int | None
) -> Iterator[Prompt]:
    seen: set[str] = set()
    for item in items:
        name, filled = str(item["id"]), fill(template, item, "prompt.template")
        if name in seen:
            raise DataError("an id occurs twice in a data set", where=f"prompt {name}", expected="one item an id")
        seen.add(name)
        messages: str | list[dict[str, str]] = filled
        if system is not None:
            messages = [{"role": "system", "content": system}, {"role": "user", "content": filled}]
        text = tokenizer.render(messages, chat=chat)
        token_ids = tokenizer.encode(text)
        if limit is not None and len(token_ids) > limit:
            raise DataError(
                "a prompt is longer than the context allows",
                where=f"prompt {name}",
                got=f"{len(token_ids)} tokens: {text[:60]!r}...",
                expected=f"at most {limit} tokens",
                hint="raise prompt.max_tokens (the policy's context is the limit), shorten prompt.template, or drop the item",
            )
        yield Prompt(name, token_ids, text, item)
