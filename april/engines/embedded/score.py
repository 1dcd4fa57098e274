"""Log-probs of given tokens in one packed forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from april.core.errors import EngineError
from april.core.sample import Sample
from april.engines.embedded.forward import Forward
from april.engines.embedded.sampler import log_distribution, spec_batch


def score_samples(forward: Forward, samples: Sequence[Sample], chunk_tokens: int) -> list[npt.NDArray[np.float32]]:
    """Log-probs float32 (T,) of each response under the distribution that the sample's spec draws from.

    Args:
        chunk_tokens: tokens of one forward, unless one sample alone has more.

    Raises:
        EngineError: for a sample beyond the model's context.
    """
    scores: list[npt.NDArray[np.float32]] = []
    for chunk in _chunks(samples, chunk_tokens, forward.max_positions):
        full = [sample for sample in chunk if len(sample)]
        rows = [np.concatenate([sample.prompt.token_ids, sample.token_ids]) for sample in full]
        logits = forward.response_logits(rows, [len(sample.prompt.token_ids) for sample in full]) if full else []
        found = iter(logits)
        scores += [_logprobs(sample, next(found)) if len(sample) else np.zeros(0, np.float32) for sample in chunk]
    return scores


def _chunks(samples: Sequence[Sample], chunk_tokens: int, max_tokens: int) -> Iterator[list[Sample]]:
    chunk: list[Sample] = []
    size = 0
    for sample in samples:
        total = len(sample.prompt.token_ids) + len(sample)
        if total > max_tokens:
            raise EngineError("a sample is longer than the context", where=str(sample.id), got=total, expected=f"<= {max_tokens}")
        if chunk and size + total > chunk_tokens:
            yield chunk
            chunk, size = [], 0
        chunk.append(sample)
        size += total
    if chunk:
        yield chunk


@torch.inference_mode()
def _logprobs(sample: Sample, logits: torch.Tensor) -> npt.NDArray[np.float32]:
    spec = spec_batch([sample.spec], logits.shape[-1], logits.device, logits.dtype)
    token = torch.from_numpy(sample.token_ids.astype(np.int64)).to(logits.device)
    chosen = log_distribution(logits, spec).gather(1, token[:, None]).squeeze(1)
    scored: npt.NDArray[np.float32] = chosen.float().cpu().numpy()
    return scored
