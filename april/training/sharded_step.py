"""The learner of one rank: forwards and backwards of its share of the samples; columns are whole on every rank.

    shares      whole samples, or whole groups where an atom sees groups, dealt out by tokens
    rounds      every rank makes as many passes as the one with most; without work of its own, one that adds 0
    batch       where an atom sees the whole mini-batch, log-probs are exchanged and each rank differentiates its own

Denominators are in the columns, which no rank has only a part of, so the sum of the ranks' gradients is the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from april.algorithms.columns import TokenBatch
from april.core.errors import AprilError
from april.models.policy import Policy, ResponseLogprobs
from april.training.batch import TrainingBatch
from april.training.sharded_ranks import Ranks, deal
from april.training.step import Found, Learner, found_in, not_finite, split

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class ShardedLearner(Learner):
    """See `Learner`; every method is called by all ranks with the same arguments, and returns the same on all."""

    ranks: Ranks

    def _measured(
        self, policy: Policy, batch: TrainingBatch, samples: Tensor, *, entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        layout, _ = batch.tokens.layout.take(samples)
        found = torch.zeros(2 if entropy else 1, layout.num_tokens, dtype=torch.float64)
        for micro in self._rounds(batch, samples):
            chosen = shortest(batch, samples) if micro is None else micro
            temperatures = batch.tokens.take(samples[chosen])["temperature"]
            with torch.no_grad():
                output = policy.response_logprobs(self._sequences(policy, batch, samples[chosen]), temperatures, entropy=entropy)
            if micro is not None:
                _, rows = layout.take(micro)
                found[0, rows] = output.logprobs.to("cpu", torch.float64)
                if entropy and output.entropies is not None:
                    found[1, rows] = output.entropies.to("cpu", torch.float64)
        found = self.ranks.sum(found)
        return found[0], found[1] if entropy else None

    def _gradients(self, batch: TrainingBatch, tokens: TokenBatch, samples: Tensor) -> list[Found]:
        if self.algorithm.unit == "batch":
            return self._exchanged(batch, tokens, samples)

        def forward(micro: Tensor) -> tuple[Tensor, Callable[[], Found], AprilError | None]:
            own = tokens.take(micro)
            output = self._forward(batch, own, samples[micro])
            loss, own = self._loss(output, own)
            finite = bool(torch.isfinite(loss.total))
            problem = None if finite else not_finite(batch, samples[micro], float(loss.total.detach()))
            return loss.total, lambda: found_in(loss, own, output), problem

        def company() -> Tensor:
            nothing = shortest(batch, samples)
            return self._forward(batch, tokens.take(nothing), samples[nothing]).logprobs.sum()

        return backward_in_rounds(self.ranks, self._rounds(batch, samples, whole=self.algorithm.whole_groups), forward, company)

    def _exchanged(self, batch: TrainingBatch, tokens: TokenBatch, samples: Tensor) -> list[Found]:
        """One loss over the whole mini-batch, computed by every rank and differentiated in its own log-probs."""
        if len(samples) == 0:
            return []
        share = torch.tensor(shares_of_ranks(self.ranks.count, batch, samples)[self.ranks.index], dtype=torch.int64)
        chosen = share if len(share) else shortest(batch, samples)
        output = self._forward(batch, tokens.take(chosen), samples[chosen])
        rows = tokens.layout.take(share)[1] if len(share) else None
        logprobs = self._whole(output.logprobs, rows, tokens.layout.num_tokens)
        entropies = None if output.entropies is None else self._whole(output.entropies, rows, tokens.layout.num_tokens)
        together = ResponseLogprobs(logprobs, entropies)
        loss, columns = self._loss(together, tokens)
        if not bool(torch.isfinite(loss.total)):
            raise not_finite(batch, samples, float(loss.total.detach()))
        loss.total.backward()  # type: ignore[no-untyped-call]
        return [found_in(loss, columns, together)]

    def _whole(self, own: Tensor, rows: Tensor | None, num_tokens: int) -> Tensor:
        """(N,): values of all ranks; those in `rows` are this rank's own, with gradient; without rows it has none."""
        values = torch.zeros(num_tokens, dtype=torch.float64)
        if rows is not None:
            values[rows] = own.detach().to("cpu", torch.float64)
        values = self.ranks.sum(values).to(own.device, own.dtype)
        return values + own.sum() * 0 if rows is None else values.index_put((rows.to(own.device),), own)

    def _rounds(self, batch: TrainingBatch, samples: Tensor, *, whole: bool = False) -> list[Tensor | None]:
        return rounds(self.ranks, batch, samples, self.config.micro_batch_tokens, self.policy, whole=whole)


def shares_of_ranks(num_ranks: int, batch: TrainingBatch, samples: Tensor, *, whole: bool = False) -> list[list[int]]:
    """For each rank indices into `samples`, even in tokens; groups stay together where they must be `whole`."""
    lengths = [len(batch.samples[i].prompt.token_ids) + len(batch.samples[i]) for i in samples.tolist()]
    groups = batch.tokens.layout.group_of_sample[samples].tolist() if whole else range(len(lengths))
    members: dict[int, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    units = list(members.values())
    dealt = deal([sum(lengths[index] for index in unit) for unit in units], num_ranks)
    return [sorted(index for unit in share for index in units[unit]) for share in dealt]


def rounds(
    ranks: Ranks, batch: TrainingBatch, samples: Tensor, budget_tokens: int, policy: Policy, *, whole: bool = False
) -> list[Tensor | None]:
    """This rank's micro-batches, indices into `samples`; None where it only keeps the others company."""
    cuts: list[list[Tensor | None]] = []
    for share in shares_of_ranks(ranks.count, batch, samples, whole=whole):
        own = torch.tensor(share, dtype=torch.int64)
        cuts.append([own[micro.sort().values] for micro in split(batch, samples[own], budget_tokens, policy, whole=whole)])
    own_cut, most = cuts[ranks.index], max(len(cut) for cut in cuts)
    return own_cut + [None] * (most - len(own_cut))


def backward_in_rounds(
    ranks: Ranks,
    micros: list[Tensor | None],
    forward: Callable[[Tensor], tuple[Tensor, Callable[[], Result], AprilError | None]],
    company: Callable[[], Tensor],
) -> list[Result]:
    """Backward passes of all ranks, as many on each; what all of them found, on every rank.

    Args:
        ranks: who takes part.
        micros: as `rounds` says.
        forward: of a micro-batch its loss, what it reports after the backward pass, and what is wrong with it.
        company: anything computed by a forward pass; it is added 0 times.

    Raises:
        AprilError: what is wrong on any rank, on all of them.
    """
    found: list[Result] = []
    problem: AprilError | None = None
    for micro in micros:
        if micro is None:
            (company() * 0).backward()  # type: ignore[no-untyped-call]
            continue
        total, report, wrong = forward(micro)
        problem = problem or wrong
        total.backward()  # type: ignore[no-untyped-call]  # even then: the others wait for this rank's part
        found.append(report())
    everybody = ranks.gather((found, problem))
    for _, told in everybody:
        if told is not None:
            raise told
    return [one for ones, _ in everybody for one in ones]


def shortest(batch: TrainingBatch, samples: Tensor) -> Tensor:
    """int64 (1,): an index into `samples`."""
    lengths = [len(batch.samples[i].prompt.token_ids) + len(batch.samples[i]) for i in samples.tolist()]
    return torch.tensor([min(range(len(lengths)), key=lengths.__getitem__)])
