"""Which samples can never run, and which draws are none."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from april.core.errors import EngineError
from april.core.ids import Version
from april.core.sample import Sample
from april.engines.embedded.emitted import Emitted
from april.engines.embedded.scheduler import Request


def check_sample(sample: Sample, *, context_tokens: int, row_tokens: int, vocab_size: int, has_tokenizer: bool) -> None:
    """Refuse what the engine cannot do for this sample.

    Args:
        context_tokens: of the model.
        row_tokens: largest KV row.

    Raises:
        EngineError: finished, used up, too long, stop strings without a tokenizer, or unknown tokens.
    """
    where, prompt = str(sample.id), len(sample.prompt.token_ids)
    total, largest = prompt + len(sample), min(prompt + sample.spec.max_new_tokens, context_tokens)
    if sample.stop is not None:
        raise EngineError("a sample is already finished", where=where, got=f"stop {sample.stop!r}")
    if sample.remaining_tokens < 1:
        raise EngineError("nothing is left of a sample's budget", where=where, got=len(sample))
    if total >= context_tokens:
        raise EngineError("a sample does not fit the context", where=where, got=total, expected=f"< {context_tokens} tokens")
    if largest > row_tokens:
        raise EngineError(
            "a sample alone may need more KV memory than there is",
            where=where,
            got=f"prompt + budget = {largest} tokens",
            expected=f"<= {row_tokens}",
            hint="raise engine.kv_tokens or lower sampling.max_new_tokens",
        )
    if sample.spec.stop_strings and not has_tokenizer:
        raise EngineError("stop strings need a tokenizer", where=where, hint="give the engine one")
    tokens = np.concatenate([sample.prompt.token_ids, sample.token_ids])
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocab_size:
        raise EngineError(
            "a token is not in the vocabulary", where=where, got=int(tokens.max()), expected=f"0 to {vocab_size - 1}"
        )


def check_finite(emitted: Emitted, request: Callable[[int], Request], version: Version) -> None:
    """Refuse tokens that were drawn from logits that are not finite.

    Args:
        request: of a slot.
        version: of the weights.

    Raises:
        EngineError: names the oldest sample among them.
    """
    broken = emitted.not_finite().tolist()
    if broken:
        oldest = min(map(request, broken), key=lambda found: found.serial)
        raise EngineError(
            "the model's logits are not finite",
            where=str(oldest.id),
            got=f"{len(broken)} of {len(emitted.slots)} samples, with weights of version {version}",
            hint="look for weights that are not finite; if training made them, lower training.lr",
        )
