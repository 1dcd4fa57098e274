"""Top-k and top-p by candidates: the same tokens as by sorting everything, at the price of the rows that ask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from april.core.sampling import SamplingSpec
from april.engines.embedded import truncate
from april.engines.embedded.sampler import draw, log_distribution, spec_batch, spec_batch_of, spec_columns

CPU = torch.device("cpu")


def expected_tokens(row: torch.Tensor, top_k: int, top_p: float) -> set[int]:
    """Sort everything, keep so many, then those before whom less than the mass `top_p` stands."""
    ids = row.sort(descending=True, stable=True).indices[: top_k or None]
    mass = row[ids].double().softmax(-1)
    before = mass.cumsum(-1) - mass
    return set(ids[(before < top_p) | (top_p >= 1)].tolist())


class Sorted(TorchDispatchMode):
    """(rows, ranks) of every sort and every selection."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ in ("sort", "topk"):
            self.sizes.append(tuple(out[0].shape))
        return out


def sorted_sizes(logits: torch.Tensor, specs: list[SamplingSpec]) -> list[tuple[int, int]]:
    batch = spec_batch(specs, logits.shape[1], CPU, logits.dtype)
    with Sorted() as seen:
        draw(logits, batch, torch.full((len(specs),), 0.5, dtype=torch.float64))
    return seen.sizes


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_the_same_tokens_stay_as_by_sorting_everything(data: st.DataObject) -> None:
    rows, size = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 40))
    levels = data.draw(st.sampled_from([3, 1000]))  # few levels: many tokens are equally likely
    seed = data.draw(st.integers(0, 10**6))
    logits = torch.randint(0, levels, (rows, size), generator=torch.Generator().manual_seed(seed)).double() * (6 / levels)
    cuts = st.tuples(
        st.sampled_from([0, 1, 2, 5, 13, 60]), st.sampled_from([0.001, 0.2, 0.5, 0.97, 1.0]), st.sampled_from([0.0, 1.0])
    )
    specs = [SamplingSpec(5, top_k=k, top_p=p, temperature=t) for k, p, t in (data.draw(cuts) for _ in range(rows))]
    columns = torch.tensor([spec_columns(spec) for spec in specs], dtype=torch.float64).numpy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(truncate, "_CANDIDATES", data.draw(st.sampled_from([1, 3, 8, 1024])))
        found = [
            log_distribution(logits, spec_batch_of(columns, size, CPU, torch.float64, static=static)) for static in (False, True)
        ]
    for index, spec in enumerate(specs):
        wanted = expected_tokens(logits[index], spec.top_k, spec.top_p) if spec.temperature else {int(logits[index].argmax())}
        for logprobs in found:
            assert set((logprobs[index] > -torch.inf).nonzero().squeeze(1).tolist()) == wanted
            assert float(logprobs[index].exp().sum()) == pytest.approx(1)


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.6}, {"top_k": 9, "top_p": 0.8}])
def test_one_spec_serves_many_rows(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truncate, "_CANDIDATES", 4)
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * torch.arange(1, 7)[:, None]
    spec = SamplingSpec(5, **options)
    together = log_distribution(logits, spec_batch([spec], 40, CPU, torch.float64))
    alone = torch.cat([log_distribution(row[None], spec_batch([spec], 40, CPU, torch.float64)) for row in logits])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


def test_top_k_sorts_its_candidates_only() -> None:
    logits = torch.randn(4, 50_000, generator=torch.Generator().manual_seed(0))
    assert sorted_sizes(logits, [SamplingSpec(5, top_k=20)] * 4) == [(4, 21)]
    assert sorted_sizes(logits, [SamplingSpec(5, top_k=20, top_p=0.95), SamplingSpec(5, top_k=7)] * 2) == [(4, 21)]


def test_top_p_sorts_more_than_some_candidates_only_in_rows_that_need_it() -> None:
    logits = 0.1 * torch.randn(4, 50_000, generator=torch.Generator().manual_seed(0))
    logits[:3, 17] = 14.0
    assert sorted_sizes(logits, [SamplingSpec(5, top_p=0.9)] * 4) == [(4, 1024), (1, 50_000)]
    assert sorted_sizes(logits[:3], [SamplingSpec(5, top_p=0.9)] * 3) == [(3, 1024)]


def test_rows_that_cut_nothing_pay_nothing() -> None:
    logits = torch.randn(4, 5_000, generator=torch.Generator().manual_seed(0))
    cut, plain, greedy = SamplingSpec(5, top_k=4), SamplingSpec(5), SamplingSpec(5, temperature=0.0, top_k=4, top_p=0.5)
    assert sorted_sizes(logits, [plain, cut, greedy, plain]) == [(1, 5)]
    assert sorted_sizes(logits, [plain, greedy, greedy, SamplingSpec(5, top_k=5_000)]) == []
