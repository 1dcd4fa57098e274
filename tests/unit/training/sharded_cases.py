"""Updates that every number of ranks must do alike, and the process of one rank that does them."""

from __future__ import annotations

import faulthandler
import multiprocessing
import shutil
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from learner_fixtures import VOCABULARY, make_batch, small_policy

from april.algorithms.spec import AlgorithmConfig
from april.config.load import read_preset
from april.core.errors import ModelError
from april.core.group import Batch
from april.core.metric import Metrics, values
from april.models.policy import Policy
from april.testing.toy_model import toy_model
from april.training.config import TrainerConfig
from april.training.sharded import ShardedTrainer
from april.training.sharded_ranks import Ranks
from april.training.single import Trainer
from april.training.value import ValueModel

REWARDS = [[1.0, 0.0, 0.5], [0.0, 1.0, 1.0, 0.25], [1.0, 1.0], [0.0, 0.75, None], [0.5, 0.25]]
LONE = [[1.0, 0.0]]
NUM_UPDATES = 2
VALUE: dict[str, Any] = {"value": {"lr": 1e-2, "eps": 1e-3, "num_epochs": 2, "warmup_steps": 1}, "num_optimizer_steps": 2}
LORA: dict[str, Any] = {"lora": {"rank": 3, "alpha": 6.0}}


@dataclass(frozen=True)
class Case:
    """A policy, an algorithm and the trainer's options."""

    preset: str = "grpo"
    kind: str = "qwen3"
    dtype: torch.dtype = torch.float64
    budget: int = 30
    tied: bool = False
    rewards: list[list[float | None]] = field(default_factory=lambda: REWARDS)  # type: ignore[arg-type]
    options: dict[str, Any] = field(default_factory=dict)

    def policy(self, seed: int = 0) -> Policy:
        """As `learner_fixtures.small_policy` has it, or with its embeddings as output layer."""
        if not self.tied:
            return small_policy(self.kind, self.dtype, seed)
        sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_heads": 2, "num_kv_heads": 1}
        return Policy(toy_model(self.kind, dtype=self.dtype, seed=seed, tied=True, **sizes))  # type: ignore[arg-type]

    def trainer(self, ranks: Ranks | None) -> Trainer:
        """In this process alone, or as one of several ranks."""
        options = {"ranks": 2, "lr": 1e-2, "eps": 1e-3, "max_grad_norm": 0.5, "micro_batch_tokens": self.budget} | self.options
        config = TrainerConfig(**options)
        algorithm = AlgorithmConfig.model_validate(read_preset(self.preset)[0])
        policy = self.policy()
        own = "reference" in algorithm.requires and config.lora is None
        reference = self.policy(seed=1) if own else None
        if ranks is None:
            return Trainer(policy, algorithm, config, reference=reference, total_steps=4)
        return ShardedTrainer(policy, algorithm, config, ranks=ranks, reference=reference, total_steps=4)

    def batch(self, step: int) -> Batch:
        """Data of a step, some of it older than the weights."""
        return Batch(step, step, make_batch(self.rewards, seed=step).groups)


CASES = {
    "float64": Case(),
    "float32": Case(dtype=torch.float32),
    "float32 in one micro-batch": Case(dtype=torch.float32, budget=100_000),
    "every sample alone": Case(budget=1),
    "fewer samples than ranks": Case(rewards=LONE),  # type: ignore[arg-type]
    "whole groups": Case("simpo"),
    "the whole batch at once": Case("kl_cov"),
    "fewer samples than ranks, the whole batch at once": Case("kl_cov", rewards=LONE),  # type: ignore[arg-type]
    "padded forward": Case(kind="gemma2"),
    "experts": Case(kind="qwen3_moe"),
    "recomputed layers": Case(options={"gradient_checkpointing": True}),
    "several steps and passes": Case(options={"num_optimizer_steps": 2, "num_epochs": 2}),
    "reference": Case("grpo_kl"),
    "entropy": Case("entropy_regularised", options={"entropy": True}),
    "slow and fast steps": Case("sfpo"),
    "kept on the CPU": Case(options={"sharding": {"cpu_offload": True}}),
    "tied embeddings": Case(tied=True),
    "value model": Case("ppo", options=VALUE),
    "value model, every sample alone": Case("ppo", budget=1, options=VALUE),
    "value model, float32": Case("ppo", dtype=torch.float32, options=VALUE),
    "value model, fewer samples than ranks": Case("ppo", rewards=LONE, options=VALUE),  # type: ignore[arg-type]
    "adapters": Case(options=LORA),
    "adapters, float32": Case(dtype=torch.float32, options=LORA),
    "adapters, padded forward": Case(kind="gemma2", options=LORA),
    "adapters, recomputed layers": Case(options=LORA | {"gradient_checkpointing": True}),
    "adapters, the base as reference": Case("grpo_kl", options=LORA),
    "adapters, value model": Case("ppo", options=LORA | VALUE),
    "layers stay whole": Case(options={"sharding": {"reshard_after_forward": False}}),
}
SAVED = ("tied embeddings", "adapters", "value model", "adapters, value model")
"""Cases whose checkpoints are read at other numbers of ranks."""
QUICK = ("float64", "tied embeddings", "float32", "whole groups", "the whole batch at once", "value model", "adapters")
"""Cases of the one rank that needs no process of its own; several ranks do all."""
IN_HALF_PRECISION = Case(dtype=torch.float32, options={"sharding": {"param_dtype": "bfloat16", "reduce_dtype": "float32"}})


def outcome(trainer: Trainer, case: Case) -> dict[str, Any]:
    """Gradients before clipping of all optimiser steps, weights and metrics of the updates of a case."""
    gradients: list[torch.Tensor] = []
    plain = trainer._learner.backward

    def backward(*arguments: Any) -> Metrics:
        metrics = plain(*arguments)
        gradients.extend(_whole(p.grad) for g in trainer._optimizer.param_groups for p in g["params"] if p.grad is not None)
        return metrics

    object.__setattr__(trainer._learner, "backward", backward)
    of_values: list[torch.Tensor] = []
    if trainer._value is not None:
        _watch(trainer._value, of_values)
    rows = [values(trainer.update(case.batch(step))) for step in range(NUM_UPDATES)]
    num = sum(len(group["params"]) for group in trainer._optimizer.param_groups)
    return {
        "value gradients": of_values,
        "gradients": gradients,
        "weights": everything(trainer),
        "metrics": rows,
        "num_parameters": num,
    }


def _watch(value: ValueModel, found: list[torch.Tensor]) -> None:
    plain = value._gradients

    def gradients(*arguments: Any) -> Any:
        losses = plain(*arguments)
        found.extend(_whole(p.grad) for p in value.trunk.module.parameters() if p.grad is not None)
        return losses

    value._gradients = gradients  # type: ignore[method-assign]


def everything(trainer: Trainer) -> dict[str, torch.Tensor]:
    """What is published, and the value model where there is one."""
    weights = {name: tensor.clone() for name, tensor in trainer.weights().items()}
    if trainer._value is not None:
        weights |= {f"value: {name}": tensor.clone() for name, tensor in trainer._value.trunk.state().items()}
    return weights


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def run_ranks(count: int, folder: Path) -> dict[str, Any]:
    """What rank 0 of so many found; in this process where it is the only one."""
    if count == 1:
        torch.set_num_threads(1)
        serve(0, 1, folder)
    else:
        # Once in many runs gloo dies of a signal, with the process; a run starts its ranks again then, and so do we, once.
        codes = _ended(count, folder)
        if any(code is not None and code < 0 for code in codes):
            warnings.warn(f"ranks ended with {codes}, and are started again", RuntimeWarning, stacklevel=2)
            codes = _ended(count, folder)
        if codes != [0] * count:
            raise RuntimeError(f"ranks ended with {codes}")
    found: dict[str, Any] = torch.load(folder / f"found-{count}.pt", weights_only=False)
    return found


def _ended(count: int, folder: Path) -> list[int | None]:
    """Exit codes of the processes of all ranks; None of one that did not end in time."""
    context = multiprocessing.get_context("spawn")
    (folder / f"store-{count}").unlink(missing_ok=True)
    for left in folder.glob(f"*/checkpoint-{count}"):
        shutil.rmtree(left)
    processes = [context.Process(target=serve, args=(rank, count, folder), daemon=True) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes


def serve(rank: int, count: int, folder: Path) -> None:
    """One rank: all cases, then checkpoints written and read."""
    faulthandler.enable()
    torch.set_num_threads(1)
    ranks = Ranks.join(rank, count, f"file://{folder / f'store-{count}'}", timeout_s=120)
    names = QUICK if count == 1 else tuple(CASES)
    found: dict[str, Any] = {name: outcome(CASES[name].trainer(ranks), CASES[name]) for name in names} | {"names": names}
    found["half"] = outcome(IN_HALF_PRECISION.trainer(ranks), IN_HALF_PRECISION)
    found["precision"] = {offload: precision(ranks, offload) for offload in (False, True)}
    found["refused"] = refused(ranks)
    found["resumed"] = resumed(ranks, folder)
    if ranks.first:
        torch.save(found, folder / f"found-{count}.pt")
    ranks.wait()
    ranks.leave()


def precision(ranks: Ranks, offload: bool) -> dict[str, Any]:
    """In what layers compute, gradients arrive and weights and moments are kept, when bfloat16 computes on float32."""
    options = {"sharding": {**IN_HALF_PRECISION.options["sharding"], "cpu_offload": offload}, "lr": 1e-6, "eps": 1e-12}
    trainer = Case(dtype=torch.float32, options=options).trainer(ranks)
    before = {name: tensor.clone() for name, tensor in trainer.weights().items()}
    found: dict[str, Any] = {"computed": set(), "gradients": set()}
    layer = trainer.policy.module.model.layers[1].self_attn.q_proj
    layer.register_forward_pre_hook(lambda module, given: found["computed"].update((module.weight.dtype, given[0].dtype)))
    plain = trainer._learner.backward

    def backward(*arguments: Any) -> Metrics:
        metrics = plain(*arguments)
        found["gradients"] |= {p.grad.dtype for p in trainer.policy.module.parameters() if p.grad is not None}
        return metrics

    object.__setattr__(trainer._learner, "backward", backward)
    trainer.update(IN_HALF_PRECISION.batch(0))
    state = trainer._optimizer.state.values()
    found["kept"] = {p.dtype for p in trainer.policy.module.parameters()}
    found["moments"] = {tensor.dtype for one in state for kind, tensor in one.items() if kind != "step"}
    found["moved"] = [float((tensor - before[name]).abs().max()) for name, tensor in trainer.weights().items()]
    found["seen in bfloat16"] = [
        float((tensor.bfloat16() != before[name].bfloat16()).float().mean()) for name, tensor in trainer.weights().items()
    ]
    return found


def refused(ranks: Ranks) -> list[str]:
    """What every rank says when the loss of the last one alone is not finite."""
    trainer = Case().trainer(ranks)
    plain = trainer._learner._loss

    def broken(output: Any, tokens: Any) -> Any:
        last = ranks.index == ranks.count - 1
        return plain(output._replace(logprobs=output.logprobs * float("nan")) if last else output, tokens)

    object.__setattr__(trainer._learner, "_loss", broken)
    try:
        trainer.update(Case().batch(0))
    except ModelError as error:
        return ranks.gather(str(error))
    return []


def resumed(ranks: Ranks, folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Weights after one more update from checkpoints that other numbers of ranks wrote; leaves some of its own."""
    found = {}
    for name in SAVED:
        case, place = CASES[name], folder / name.replace(" ", "_")
        for other in sorted(place.glob("checkpoint-*")):
            trainer = case.trainer(ranks)
            trainer.load(other)
            trainer.update(case.batch(1))
            found[f"{name}: {other.name}"] = everything(trainer)
        trainer = case.trainer(ranks)
        trainer.update(case.batch(0))
        ranks.wait()
        own = place / f"checkpoint-{ranks.count}"
        own.mkdir(exist_ok=True, parents=True)
        trainer.save(own)
    return found
