"""Steps of a response: turns between outputs of the environment, or lines of a text; and the states they start from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from april.algorithms.columns import Layout, TokenBatch
from april.algorithms.prefix_tree import mixed, positions, segments


@dataclass(frozen=True)
class Steps:
    """The R steps of S samples, sample by sample.

    Attributes:
        step_of_token: int64 (N,), below R.
        sample: int64 (R,).
        index: int64 (R,), from 0 in each sample.
        anchor: int64 (R,), fingerprint of the state before the step; equal states of a group have equal ones.
        last: bool (R,), the last one of its sample.
        longest: most steps of one sample.
    """

    step_of_token: Tensor
    sample: Tensor
    index: Tensor
    anchor: Tensor
    last: Tensor
    longest: int

    @staticmethod
    def of(tokens: TokenBatch, delimiter_ids: Sequence[int] = ()) -> Steps:
        """The steps of a batch.

        Args:
            tokens: needs "turn" and "anchor"; with delimiters "token_ids" instead.
            delimiter_ids: when given, a step begins at each of these tokens, and its state is the text of the step before it.
        """
        layout = tokens.layout
        if delimiter_ids:
            begins = segments(tokens["token_ids"], layout, segment_tokens=1, delimiter_ids=delimiter_ids)
        else:
            begins = torch.ones_like(tokens["turn"], dtype=torch.bool)
            begins[1:] = tokens["turn"].diff() != 0
            begins[layout.offsets[:-1]] = True
        step = begins.cumsum(0) - 1
        starts = begins.nonzero().squeeze(1)
        sample = layout.sample_of_token[starts]
        index = step[starts] - step[layout.offsets[:-1]][sample]
        if delimiter_ids:
            anchor = _text_before(tokens["token_ids"], step, starts, index)
        else:
            anchor = tokens["anchor"][starts]
        last = torch.ones_like(sample, dtype=torch.bool)
        last[:-1] = sample[1:] != sample[:-1]
        return Steps(step, sample, index, anchor, last, int(index.max()) + 1 if len(index) else 0)

    def sum(self, values: Tensor) -> Tensor:
        """(N,) -> (R,): sum over the tokens of each step."""
        return values.new_zeros(len(self.sample)).index_add(0, self.step_of_token, values)


def _text_before(token_ids: Tensor, step: Tensor, starts: Tensor, index: Tensor) -> Tensor:
    text = fingerprints(token_ids, step, torch.arange(len(step), device=step.device) - starts[step], len(starts))
    before = torch.cat([text[:1], text[:-1]])
    return torch.where(index > 0, before, torch.zeros_like(before))


def fingerprints(token_ids: Tensor, row: Tensor, place: Tensor, num_rows: int) -> Tensor:
    """int64 (num_rows,): equal for rows with the same tokens at the same places.

    Args:
        token_ids: int64 (N,).
        row: int64 (N,), which row each token belongs to.
        place: int64 (N,), its place there.
        num_rows: number of rows.
    """
    return token_ids.new_zeros(num_rows).index_add(0, row, mixed(token_ids, place))


def responses(tokens: TokenBatch) -> Tensor:
    """int64 (S,): fingerprints of the samples' responses."""
    layout = tokens.layout
    return fingerprints(tokens["token_ids"], layout.sample_of_token, positions(layout), layout.num_samples)


def turns(token_ids: Tensor, environment: Tensor, layout: Layout) -> dict[str, Tensor]:
    """The columns "turn" and "anchor" of samples that environments answer.

    A step is what an environment says and what the policy answers to it; its state is what the environment says. The first
    step's state is the prompt. Output that no answer follows belongs to the last step.

    Args:
        token_ids: int64 (N,).
        environment: bool (N,), tokens of an environment.
        layout: whose they are.
    """
    if not bool(environment.any()):
        return {"turn": torch.zeros_like(token_ids), "anchor": torch.zeros_like(token_ids)}
    first = torch.zeros_like(environment)
    first[layout.offsets[:-1]] = True
    begins = environment & ~torch.cat([environment.new_zeros(1), environment[:-1]])
    begins |= environment & first
    count = begins.cumsum(0)
    step = count - layout.spread((count - begins.long())[layout.offsets[:-1]])
    answered = torch.where(environment, torch.zeros_like(step), step)
    most = torch.zeros(layout.num_samples, dtype=step.dtype, device=step.device)
    most = most.scatter_reduce(0, layout.sample_of_token, answered, "amax")
    said = environment & (step <= layout.spread(most))
    step = torch.minimum(step, layout.spread(most))
    row = (first | torch.cat([first.new_ones(1), step[1:] != step[:-1]])).cumsum(0) - 1
    starts = torch.cat([row.new_zeros(1), (row.diff() != 0).nonzero().squeeze(1) + 1])
    place = torch.arange(len(row), device=row.device) - starts[row]
    text = torch.where(said, mixed(token_ids, place), torch.zeros_like(token_ids))
    anchor = text.new_zeros(len(starts)).index_add(0, row, text)
    anchor = torch.where(step[starts] > 0, anchor, torch.zeros_like(anchor))
    return {"turn": step, "anchor": anchor[row]}
