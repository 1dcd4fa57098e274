"""One judgement: whatever a verifier does, its sample gets exactly one outcome."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from april.core.group import Failure, Outcome, Reward
from april.core.ids import SampleId
from april.core.prompt import Prompt, Tokens
from april.core.sample import Sample
from april.core.sampling import SamplingSpec
from april.rewards.base import Verifier, WrongReward, as_reward
from april.rewards.deadline import Expired, call_within

Decode = Callable[[Tokens], str]
"""Token ids to text, as the tokenizer's `decode` does it."""


def judge(verifier: Verifier, text: str, sample: Sample, timeout_s: float | None = 5.0) -> Outcome:
    """The outcome of one sample: a reward, or a failure with its reason.

    Args:
        verifier: may return, raise or hang.
        text: the decoded response.
        sample: finished.
        timeout_s: how long the verifier may take; None for ever.

    Raises:
        KeyboardInterrupt: the only thing that passes through.
    """
    try:
        return call_within(lambda: as_reward(verifier(text, sample, sample.prompt.item)), timeout_s)
    except Expired:
        return Failure(f"timed out after {timeout_s:g} s")
    except WrongReward as error:
        return Failure(str(error))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a reward that calls sys.exit, or raises a timeout of its own, costs its sample too
        return Failure(described(error))


def described(error: BaseException) -> str:
    """One line that names an error: "ValueError: ..."."""
    try:
        text = " ".join(str(error).split())[:300]
    except Exception:  # the error of a stranger may not even print
        text = "its message cannot be printed"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def judge_all(verifier: Verifier, samples: Sequence[Sample], decode: Decode, timeout_s: float | None = 5.0) -> list[Outcome]:
    """The outcomes of finished samples, in order, at once; for evaluation."""
    return [judge(verifier, decode(sample.token_ids), sample, timeout_s) for sample in samples]


def judge_gold(
    verifier: Verifier, golds: Iterable[tuple[Prompt, str]], timeout_s: float | None = 5.0
) -> list[tuple[Prompt, str, Outcome]]:
    """Each prompt and given completion with its outcome."""

    def outcome(prompt: Prompt, text: str) -> Outcome:
        sample = Sample(SampleId(0, 0, prompt.id, 0), prompt, SamplingSpec(max_new_tokens=1), stop="stop")
        return judge(verifier, text, sample, timeout_s)

    return [(prompt, text, outcome(prompt, text)) for prompt, text in golds]


def check_gold(verifier: Verifier, golds: Iterable[tuple[Prompt, str]], timeout_s: float | None = 5.0) -> list[str]:
    """For the dry run: what is wrong with the judgement of completions that must be correct.

    Args:
        verifier: the reward.
        golds: prompts, each with a completion that earns the full reward.
        timeout_s: as for `judge`.

    Returns:
        one line for each completion that fails or is judged incorrect.
    """
    wrong: list[str] = []
    for prompt, text, outcome in judge_gold(verifier, golds, timeout_s):
        if isinstance(outcome, Failure):
            wrong.append(f"{prompt.id}: {outcome.reason}; gold {text[-60:]!r}")
        elif isinstance(outcome, Reward) and not outcome.correct:
            wrong.append(f"{prompt.id}: reward {outcome.value:g}, not correct; gold {text[-60:]!r}")
    return wrong
