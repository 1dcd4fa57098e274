"""The benchmark end to end, tiny: real child processes, April and `transformers`, and how their faults are reported."""

from __future__ import annotations

import sys

import pytest

from april.bench.case import Case, Effort, EngineRecord
from april.bench.child import Child, ChildFailed
from april.bench.engine_bench import BenchOptions, make_setup, run_engine_bench
from april.bench.engine_options import engine_options
from april.bench.peers import april_embedded
from april.bench.peers.base import Setup
from april.bench.rounds import run_case
from april.bench.shapes import SHAPES
from april.bench.table import markdown
from april.bench.worker import PROBE, Worker, random_model
from april.bench.workload import WorkloadOptions
from april.core.errors import DataError, RecipeError

TINY = WorkloadOptions(prompt_tokens=4, fixed_tokens=12)


class InProcess:
    """A worker without a process of its own; saves the seconds of one more import of torch."""

    def __init__(self, name: str, *_: object) -> None:
        self._worker = Worker(name)

    def ask(self, do: str, **arguments):
        return self._worker.answer({"do": do, **arguments})

    def close(self) -> None:
        self._worker.close()


def test_a_tiny_run_compares_april_with_transformers(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "april.bench.engine_bench.Child", lambda name, *rest: (InProcess if name == PROBE else Child)(name, *rest)
    )
    options = BenchOptions(
        models=("tiny",),
        workloads=("fixed",),
        requests=(8,),
        peers=("transformers-static",),
        workload=TINY,
        effort=Effort(rounds=2, threads=1, probe_s=0.005),
        engine={"max_draft_tokens": 2},
    )
    said: list[str] = []
    results = {"command": "april bench engine", **run_engine_bench(options, tmp_path, said.append)}
    case = results["cases"][0]
    assert (case["name"], case["lengths"]["total"], case["static_batch_rows"]) == ("tiny/fixed/8", 96, 8)
    for name in ("april", "transformers-static"):
        engine = case["engines"][name]
        assert [item["num_steps"] for item in engine["rounds"]] == [12, 12]
        assert engine["tokens_per_s"]["median"] > 0 and engine["step_s"]["low"] > 0
        assert engine["peak_rss_bytes"] is None or engine["peak_rss_bytes"] > 50e6
    first = [case["engines"][name]["rounds"][0]["wall_s"] for name in ("transformers-static", "april")]
    second = [case["engines"][name]["rounds"][1]["wall_s"] for name in ("transformers-static", "april")]
    ratios = sorted((first[0] / first[1], second[0] / second[1]))
    assert case["ratios"]["transformers-static"]["low"] == pytest.approx(ratios[0])
    assert case["ratios"]["transformers-static"]["high"] == pytest.approx(ratios[1])
    assert case["roofline"]["tokens_per_s"] > case["engines"]["april"]["tokens_per_s"]["median"]
    assert 0 <= case["overhead"]["outside_fraction"] < 1
    rounds = [line.split()[3] for line in said if "round" in line]
    assert rounds == ["april", "transformers-static", "transformers-static", "april"]
    assert "| transformers-static |" in markdown(results)
    assert results["settings"]["engine"] == {"max_draft_tokens": 2} and ", max_draft_tokens = 2\n" in markdown(results)


def test_a_peer_without_its_package_says_what_is_missing(tmp_path):
    child = Child("vllm", sys.executable, 1, tmp_path / "log", limit_s=60)
    try:
        setup = make_setup("none", [Case(SHAPES["tiny"], "fixed", 2, TINY)], 1)
        reply = child.ask("open", setup={name: getattr(setup, name) for name in ("folder", "threads", "max_rows", "max_tokens")})
    finally:
        child.close()
    assert "vllm" in reply.get("missing", reply.get("version", ""))


def test_a_child_that_fails_ends_or_sleeps_is_reported_with_its_reason(tmp_path):
    child = Child("probe", sys.executable, 1, tmp_path / "log", limit_s=60)
    with pytest.raises(ChildFailed, match="unknown benchmark model"):
        child.ask("make", model="none", folder="none")
    child.kill()
    with pytest.raises(ChildFailed, match="ended"):
        child.ask("make", model="none", folder="none")
    late = Child("probe", sys.executable, 1, tmp_path / "late", limit_s=0.0)
    with pytest.raises(ChildFailed, match="too long"):
        late.ask("make", model="none", folder="none")


class FakeChild:
    """Answers at once with made-up times; `broken` after so many workloads."""

    def __init__(self, wall_s: float, broken_after: int = 1_000) -> None:
        self.wall_s, self.left, self.pid = wall_s, broken_after, 0
        self.limits: list[list[int]] = []

    def ask(self, do: str, **arguments):
        if do == "probe":
            rows = {str(count): 1e-4 for count in arguments["rows"]}
            return {"matmul_step_s": rows, "copy_bytes": 64, "copy_bytes_per_s": 1e9, "matmul_flops_per_s": 1e9}
        if do == "overhead":
            return {"step_s": 1.0, "kernel_s": 0.5, "outside_fraction": 0.5}
        self.left -= 1
        if self.left < 0:
            raise ChildFailed("a compared engine failed", got="out of memory")
        self.limits.append(arguments["max_new_tokens"])
        first_only = set(arguments["max_new_tokens"]) == {1}
        return {"wall_s": 0.1 if first_only else self.wall_s, "num_steps": max(arguments["max_new_tokens"]), "num_prefills": 1}

    def tree(self) -> list[int]:
        return []


def fake_run(peer: FakeChild, effort: Effort):
    case = Case(SHAPES["tiny"], "fixed", 2, TINY)
    children = {"april": FakeChild(2.0), "vllm": peer}
    return run_case(case, children, FakeChild(0.0), effort, lambda line: None), children  # type: ignore[arg-type]


def test_every_engine_gets_the_same_workloads_and_slow_ones_fewer_rounds():
    case, children = fake_run(FakeChild(wall_s=8.0), Effort(rounds=3, engine_s=16.0, threads=1))
    assert len(case["engines"]["april"]["rounds"]) == 3
    assert len(case["engines"]["vllm"]["rounds"]) == 2  # 8.1 s spent, then 16.2 s
    assert case["ratios"]["vllm"] == {"median": 4.0, "low": 4.0, "high": 4.0, "num": 2}
    assert children["april"].limits[:3] == [[8, 8], [1, 1], [12, 12]]  # warm-up, first tokens, everything
    assert children["vllm"].limits == children["april"].limits[:5]
    # 24 tokens; decoding is everything but the first step: (2.0 - 0.1) s over 11 steps
    assert case["engines"]["april"]["tokens_per_s"]["median"] == 12.0
    assert case["engines"]["april"]["step_s"]["median"] == pytest.approx(1.9 / 11)
    assert case["engines"]["april"]["prefill_tokens_per_s"]["median"] == pytest.approx(80.0)


def test_a_peer_that_fails_is_recorded_and_april_is_not_spared():
    case, _ = fake_run(FakeChild(4.0, broken_after=3), Effort(rounds=3, threads=1))
    assert case["engines"]["vllm"]["failed"] == "a compared engine failed: out of memory"
    assert case["ratios"]["vllm"]["num"] == 1
    case, _ = fake_run(FakeChild(4.0, broken_after=0), Effort(rounds=3, threads=1))
    assert case["ratios"] == {} and "rounds" not in case["engines"]["vllm"]
    tiny = Case(SHAPES["tiny"], "fixed", 2, TINY)
    children = {"april": FakeChild(2.0, broken_after=0)}
    with pytest.raises(ChildFailed):
        run_case(tiny, children, FakeChild(0.0), Effort(rounds=1), lambda line: None)  # type: ignore[arg-type]


def test_time_spent_counts_the_first_tokens_too():
    assert EngineRecord([{"wall_s": 2.0, "prefill_wall_s": 0.5}, {"wall_s": 1.0, "prefill_wall_s": 0.5}]).spent_s() == 4.0


@pytest.mark.parametrize(
    ("change", "where"),
    [({"workloads": ("fixt",)}, "--workload"), ({"peers": ("vlm",)}, "--peer"), ({"requests": (0,)}, "--requests")],
)
def test_options_that_cannot_mean_anything_are_refused(change, where):
    with pytest.raises(DataError) as error:
        BenchOptions(**change)
    assert error.value.where == where


def test_options_of_the_engine_are_read_and_checked():
    read = engine_options(["dtype=bfloat16", "max_draft_tokens=4", "draft_adaptive=false"])
    assert read == {"dtype": "bfloat16", "max_draft_tokens": 4, "draft_adaptive": False}
    with pytest.raises(DataError, match="sets this option of the engine itself") as fixed:
        engine_options(["threads=4"])
    assert fixed.value.got == "threads"
    for text in ("max_draft=4", "dtype=float16"):
        with pytest.raises(RecipeError, match="--engine"):
            engine_options([text])


def test_the_engine_gets_the_options(monkeypatch):
    seen: list[dict[str, object]] = []
    made = april_embedded.bench_engine
    monkeypatch.setattr(april_embedded, "bench_engine", lambda *given: seen.append(dict(given[3])) or made(*given))
    peer = april_embedded.AprilEmbedded.__new__(april_embedded.AprilEmbedded)
    peer._module, peer._setup = random_model("tiny"), Setup("", 1, 2, 12, engine={"max_draft_tokens": 2})
    assert peer.generate([[1, 2], [3, 4]], [8, 8], 2).num_tokens == [8, 8]
    assert peer.python_overhead([[1, 2], [3, 4]])["step_s"] > 0
    assert seen == [{"max_draft_tokens": 2}, {"max_draft_tokens": 0}], "steps with drafts have no fixed number of tokens"
