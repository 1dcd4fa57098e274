"""Inverse-CDF sampling: exact distribution, log-probs of what was drawn from, two levels equal to one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from april.core.random import uniforms
from april.core.sampling import SamplingSpec
from april.engines.embedded import sampler
from april.engines.embedded.sampler import draw, invert_cdf, log_distribution, spec_batch

CPU = torch.device("cpu")


def _spec(**options: object) -> SamplingSpec:
    return SamplingSpec(**({"max_new_tokens": 5} | options))  # type: ignore[arg-type]


def _log_distribution(logits: torch.Tensor, *specs: SamplingSpec) -> torch.Tensor:
    return log_distribution(logits, spec_batch(specs, logits.shape[-1], CPU, logits.dtype))


PROBABILITIES = torch.tensor([[0.5, 0.0, 0.25, 0.25]], dtype=torch.float64)


@pytest.mark.parametrize(("uniform", "token"), [(0.0, 0), (0.4999, 0), (0.5, 2), (0.7499, 2), (0.75, 3), (1 - 2**-53, 3)])
def test_each_uniform_falls_into_the_interval_of_its_token(uniform: float, token: int) -> None:
    assert invert_cdf(PROBABILITIES, torch.tensor([uniform], dtype=torch.float64)).tolist() == [token]


def test_the_last_token_with_mass_is_the_last_that_can_be_drawn() -> None:
    tail = torch.zeros(1, 6000)
    tail[0, 17] = 0.3
    for probabilities in (tail[:, :40], tail):
        assert invert_cdf(probabilities, torch.tensor([1 - 2**-53], dtype=torch.float64)).tolist() == [17]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_levels_equal_the_plain_inversion(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.softmax(3 * torch.randn(64, 20_011, generator=generator, dtype=dtype), -1)
    probabilities[:8, 100:19_000] = 0
    uniform = torch.from_numpy(uniforms(np.arange(64, dtype=np.uint64), 3))
    plain, blocks = sampler._invert_plain(probabilities, uniform), sampler._invert_blocks(probabilities, uniform)
    assert torch.equal(plain, blocks)
    assert (probabilities.gather(1, blocks[:, None]) > 0).all()
    assert len(set(blocks.tolist())) > 50


def test_frequencies_follow_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0, 0.5, -8.0]])
    count = 20_000
    uniform = torch.from_numpy(uniforms(np.full(count, 7, np.uint64), np.arange(count)))
    specs = [_spec(temperature=1.5)]
    drawn = draw(logits.expand(count, -1), spec_batch(specs * count, 6, CPU, torch.float32), uniform)
    expected = torch.softmax(logits[0] / 1.5, -1).double() * count
    found = torch.bincount(drawn.tokens, minlength=6).double()
    chi_square = float(((found - expected) ** 2 / expected).sum())
    assert chi_square < 20.5  # 0.999 quantile with 5 degrees of freedom
    wrong = torch.softmax(logits[0], -1).double() * count
    assert float(((found - wrong) ** 2 / wrong).sum()) > 100


def test_log_probs_are_those_of_the_truncated_distribution() -> None:
    logits = torch.log(torch.tensor([[0.4, 0.1, 0.3, 0.2]]))
    by_k = _log_distribution(logits, _spec(top_k=2)).exp()[0].tolist()
    assert by_k == pytest.approx([4 / 7, 0, 3 / 7, 0])
    by_p = _log_distribution(logits, _spec(top_p=0.6)).exp()[0].tolist()
    assert by_p == pytest.approx([4 / 7, 0, 3 / 7, 0])
    both = _log_distribution(logits, _spec(top_k=3, top_p=0.85)).exp()[0].tolist()
    assert both == pytest.approx([4 / 9, 0, 3 / 9, 2 / 9])
    all_of_it = _log_distribution(logits, _spec(top_p=1.0, top_k=0)).exp()[0].tolist()
    assert all_of_it == pytest.approx([0.4, 0.1, 0.3, 0.2])


def test_equal_tokens_at_the_edge_of_top_k_keep_their_number() -> None:
    kept = _log_distribution(torch.zeros(1, 5), _spec(top_k=2)).exp()[0].tolist()
    assert kept == pytest.approx([0.5, 0.5, 0, 0, 0])


def test_specs_of_a_batch_do_not_touch_each_other() -> None:
    specs = [
        _spec(),
        _spec(temperature=0),
        _spec(temperature=0.5),
        _spec(top_p=0.5),
        _spec(top_k=1),
        _spec(top_k=3, temperature=2.0),
    ]
    logits = torch.randn(len(specs), 50, generator=torch.Generator().manual_seed(3))
    together = _log_distribution(logits, *specs)
    for index, spec in enumerate(specs):
        alone = _log_distribution(logits[index : index + 1], spec)[0]
        torch.testing.assert_close(together[index], alone, rtol=0, atol=1e-6)
    assert (together[0] > -math.inf).all() and (together[4] > -math.inf).sum() == 1


def test_greedy_takes_the_best_token_with_log_prob_zero() -> None:
    logits = torch.tensor([[0.1, 3.0, 2.9]]).expand(4, -1)
    drawn = draw(logits, spec_batch([_spec(temperature=0, entropy=True)] * 4, 3, CPU, torch.float32), torch.rand(4).double())
    assert drawn.tokens.tolist() == [1] * 4 and drawn.logprobs.tolist() == [0.0] * 4
    assert drawn.entropies is not None and drawn.entropies.abs().max() == 0


def test_entropy_is_that_of_the_sampling_distribution() -> None:
    logits = torch.zeros(2, 8)
    drawn = draw(
        logits, spec_batch([_spec(entropy=True), _spec(top_k=2)], 8, CPU, torch.float32), torch.tensor([0.1, 0.9]).double()
    )
    assert drawn.entropies is not None
    assert drawn.entropies.tolist() == pytest.approx([math.log(8), math.log(2)])
    assert (
        draw(logits, spec_batch([_spec(), _spec()], 8, CPU, torch.float32), torch.tensor([0.1, 0.9]).double()).entropies is None
    )


@pytest.mark.parametrize("size", [7, 5_000])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_give_a_token_and_no_log_prob(size: int, value: float) -> None:
    logits = torch.randn(4, size, generator=torch.Generator().manual_seed(0))
    logits[1, 2] = logits[2, 4] = value
    for kinds in ([_spec(), _spec(), _spec(temperature=0), _spec(top_p=0.9, top_k=3)], [_spec(temperature=0)] * 4):
        drawn = draw(logits, spec_batch(kinds, size, CPU, torch.float32), torch.full((4,), 0.5).double())
        assert 0 <= int(drawn.tokens.min()) <= int(drawn.tokens.max()) < size
        assert drawn.logprobs.isfinite().tolist() == [True, False, False, True]
    fine = draw(logits[[0, 3]], spec_batch([_spec(), _spec(temperature=0)], size, CPU, torch.float32), torch.zeros(2).double())
    assert fine.logprobs.isfinite().all()
