"""GRPO in one file: one plain loop that shares no code with the package, and the oracle for it.

    python examples/minimal_grpo.py --model path/to/policy --steps 20

Each step: take prompts, sample a group of responses to each, judge them, compare each reward with its group, take one
clipped-surrogate step. Nothing is packed, cached between steps, overlapped or resumed. April's synchronous run has to equal
this file step by step: the same tokens, the same log-probs, the same weights. That works because random numbers are
addressed: the uniform that draws token t of a response depends on (seed, epoch, prompt, group, member, t) and on nothing else.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

BITS = (1 << 64) - 1


class Problem(NamedTuple):
    """A prompt with its name, its tokens, and what the reward needs."""

    id: str
    token_ids: list[int]
    item: Any = None


class Response(NamedTuple):
    """Sampled tokens, the end-of-sequence token included, and their log-probs."""

    token_ids: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class Options:
    """What a run is made of; bounds of the ratio are ratios."""

    steps: int = 20
    prompts_per_step: int = 16
    group_size: int = 8
    max_new_tokens: int = 512
    temperature: float = 1.0
    eos_ids: tuple[int, ...] = ()
    seed: int = 0
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = 1e-8
    low: float = 0.8
    high: float = 1.2
    std_eps: float = 1e-6
    max_grad_norm: float = 1.0


@dataclass
class Step:
    """What one step did, group by group."""

    problems: list[Problem] = field(default_factory=list)
    responses: list[list[Response]] = field(default_factory=list)
    rewards: list[list[float]] = field(default_factory=list)
    loss: float = 0.0
    grad_norm: float = 0.0


# ---------------------------------------------------------------------------------------------- addressed random numbers
def stream_key(*address: object) -> int:
    """64 bits that belong to an address."""
    text = "\x1f".join(str(part) for part in address)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def mix(x: int) -> int:
    """The finaliser of SplitMix64."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & BITS
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & BITS
    return x ^ (x >> 31)


def uniform(key: int, position: int) -> float:
    """The number in [0, 1) of a position in a stream."""
    return (mix(mix(key) ^ mix(((position + 1) * 0x9E3779B97F4A7C15) & BITS)) >> 11) * 2.0**-53


def prompt_order(problems: Sequence[Problem], seed: int) -> Iterator[tuple[int, Problem]]:
    """(epoch, problem) without end, each epoch in its own order."""
    for epoch in itertools.count():
        generator = np.random.Generator(np.random.PCG64(stream_key(seed, "order", epoch)))
        yield from ((epoch, problems[int(index)]) for index in generator.permutation(len(problems)))


# ---------------------------------------------------------------------------------------------- sampling
@torch.no_grad()
def generate(
    model: Any, prompt: Sequence[int], keys: Sequence[int], max_new_tokens: int, temperature: float, eos_ids: Sequence[int]
) -> list[Response]:
    """One response for each key. All rows have one prompt, so nothing is padded; rows that have ended run on unused."""
    responses = [Response([], []) for _ in keys]
    tokens, cache = torch.tensor([list(prompt)] * len(keys), device=model.device), None
    for position in range(max_new_tokens):
        output = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        logprobs = (at_least_float32(output.logits[:, -1]) / temperature).log_softmax(-1)
        mass = logprobs.exp().double().cumsum(-1)
        draws = torch.tensor([uniform(key, position) for key in keys], dtype=torch.float64, device=mass.device)[:, None]
        chosen = torch.searchsorted(mass, draws * mass[:, -1:], right=True).clamp(max=mass.shape[-1] - 1)
        for row, response in enumerate(responses):
            if not response.token_ids or response.token_ids[-1] not in eos_ids:
                token = int(chosen[row])
                response.token_ids.append(token)
                response.logprobs.append(float(logprobs[row, token]))
        if all(response.token_ids[-1] in eos_ids for response in responses):
            break
        tokens = chosen
    return responses


def at_least_float32(x: Tensor) -> Tensor:
    """Log-probs are computed in float32, or in float64 for a float64 model."""
    return x if x.dtype == torch.float64 else x.float()


# ---------------------------------------------------------------------------------------------- learning
def response_logprobs(
    model: Any, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probs (B, T) of the responses to B prompts, and the mask (B, T) of the places that hold a response token."""
    width, longest = max(len(p) + len(r) for p, r in sequences), max(len(r) for _, r in sequences)
    ids = torch.zeros(len(sequences), width, dtype=torch.int64, device=model.device)
    inside, mask = torch.zeros_like(ids), torch.zeros(len(sequences), longest, dtype=torch.bool, device=model.device)
    where = torch.zeros(len(sequences), longest, dtype=torch.int64, device=model.device)
    for row, (prompt, response) in enumerate(sequences):
        length = len(prompt) + len(response)
        ids[row, :length] = torch.tensor([*prompt, *response])
        inside[row, :length] = 1
        mask[row, : len(response)] = True
        where[row, : len(response)] = torch.arange(len(prompt), length)
    logits = at_least_float32(model(input_ids=ids, attention_mask=inside, use_cache=False).logits) / temperature
    before = (where - 1).clamp(min=0)  # the logits at a position predict the next token
    predicted = logits.gather(1, before[:, :, None].expand(-1, -1, logits.shape[-1])).log_softmax(-1)
    logprobs = predicted.gather(2, ids.gather(1, where)[:, :, None])[:, :, 0]
    return torch.where(mask, logprobs, 0.0), mask


def group_advantages(rewards: Sequence[float], eps: float) -> list[float]:
    """(R - mean) / (std + eps) with the sample standard deviation; 0 where all agree."""
    if max(rewards) == min(rewards):
        return [0.0] * len(rewards)
    values = np.asarray(rewards, np.float64)
    return [float(x) for x in (values - values.mean()) / (values.std(ddof=1) + eps)]


def grpo_loss(current: Tensor, proximal: Tensor, advantages: Tensor, mask: Tensor, low: float = 0.8, high: float = 1.2) -> Tensor:
    """Clipped surrogate, averaged over the tokens of each response and then over responses.

    Args:
        current, proximal: log-probs (B, T).
        advantages: (B,).
        mask: (B, T), True on response tokens.
    """
    ratio, credit = (current - proximal).exp(), advantages[:, None]
    loss = torch.maximum(-credit * ratio, -credit * ratio.clamp(low, high))
    per_response = torch.where(mask, loss, 0.0).sum(1) / mask.sum(1)
    return per_response.mean()


def collect(
    model: Any, chosen: Sequence[tuple[int, int, Problem]], reward: Callable[[Problem, list[int]], float], options: Options
) -> Step:
    """Sample and judge one group for each (serial, epoch, problem)."""
    step = Step()
    for serial, epoch, problem in chosen:
        keys = [stream_key(options.seed, epoch, problem.id, serial, member, "") for member in range(options.group_size)]
        responses = generate(model, problem.token_ids, keys, options.max_new_tokens, options.temperature, options.eos_ids)
        step.problems.append(problem)
        step.responses.append(responses)
        step.rewards.append([reward(problem, response.token_ids) for response in responses])
    return step


def update(model: Any, optimizer: torch.optim.Optimizer, step: Step, options: Options) -> None:
    """One optimiser step on what was collected; none when no group has anything to learn from."""
    advantages = [a for rewards in step.rewards for a in group_advantages(rewards, options.std_eps)]
    if not any(advantages):
        return
    pairs = zip(step.problems, step.responses, strict=True)
    sequences = [(problem.token_ids, response.token_ids) for problem, responses in pairs for response in responses]
    current, mask = response_logprobs(model, sequences, options.temperature)
    credit = torch.tensor(advantages, dtype=current.dtype, device=current.device)
    loss = grpo_loss(current, current.detach(), credit, mask, options.low, options.high)
    optimizer.zero_grad()
    loss.backward()
    step.loss = loss.item()
    step.grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), options.max_grad_norm).item()
    optimizer.step()


def train(
    model: Any, problems: Sequence[Problem], reward: Callable[[Problem, list[int]], float], options: Options
) -> Iterator[Step]:
    """The loop; yields every step when it is done. The model's weights change in place."""
    model.eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=options.betas, eps=options.adam_eps, weight_decay=0.0)
    work = ((serial, epoch, problem) for serial, (epoch, problem) in enumerate(prompt_order(problems, options.seed)))
    for _ in range(options.steps):
        chosen = list(itertools.islice(work, options.prompts_per_step))
        step = collect(model, chosen, reward, options)
        update(model, optimizer, step, options)
        yield step


# ---------------------------------------------------------------------------------------------- a run
def main() -> None:
    """Train on sums; needs a Hugging Face folder with a policy that can at times answer them."""
    import reasoning_gym
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description="GRPO in one plain loop")
    parser.add_argument("--model", required=True, help="Hugging Face folder or name")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--prompt", default="{metadata[expression]}", help="template over the fields of a problem")
    arguments = parser.parse_args()
    tokenizer, model = (kind.from_pretrained(arguments.model) for kind in (AutoTokenizer, AutoModelForCausalLM))
    data = reasoning_gym.create_dataset("chain_sum", seed=1, size=2000, min_terms=4, max_terms=9, min_digits=1, max_digits=1)
    problems = [Problem(str(i), tokenizer.encode(arguments.prompt.format(**item)), item) for i, item in enumerate(data)]

    def reward(problem: Problem, token_ids: list[int]) -> float:
        numbers = re.findall(r"-?\d+", tokenizer.decode(token_ids, skip_special_tokens=True))
        return float(bool(numbers) and data.score_answer(numbers[-1], problem.item) >= 1)

    options = Options(steps=arguments.steps, lr=arguments.lr, eos_ids=(int(tokenizer.eos_token_id),))
    for number, step in enumerate(train(model, problems, reward, options)):
        lengths = [len(response.token_ids) for group in step.responses for response in group]
        print(
            f"step {number}  reward {np.mean(step.rewards):.3f}  tokens {np.mean(lengths):.0f}  |grad| {step.grad_norm:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
