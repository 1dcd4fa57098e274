"""A GRPO run by TRL's `GRPOTrainer`: `python -m april.bench.peers.trl_grpo SPEC.json` in an environment that has `trl`.

The specification names the policy, the prompts with their answers, and the options that make the update the same as that of
April's `grpo` preset: group-relative advantages with the sample standard deviation, a clipped surrogate, the mean over samples of
the mean over tokens, AdamW, no KL. The policy is saved, and one line of JSON says how long the training took.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any


def train(spec: dict[str, Any]) -> dict[str, Any]:
    """Run the specification; wall time counts from the first step to the last, without loading."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(spec["threads"])
    set_seed(spec["seed"])
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    pattern = re.compile(spec["answer_pattern"])
    lengths: list[int] = []

    def reward(completions: list[str], answer: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        lengths.extend(len(ids) for ids in completion_ids)
        found = [pattern.findall(text) for text in completions]
        return [float(bool(match) and match[-1] == right) for match, right in zip(found, answer, strict=True)]

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32),
        args=GRPOConfig(**_options(spec)),
        reward_funcs=reward,
        train_dataset=Dataset.from_list(spec["items"]),
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    trainer.train()
    trainer.model.save_pretrained(spec["out"])
    tokenizer.save_pretrained(spec["out"])
    return {
        "wall_s": times[-1] - times[0],
        "num_samples": len(lengths),
        "num_tokens": sum(lengths),
        "length_median": statistics.median(lengths),
        "length_max": max(lengths),
    }


def _options(spec: dict[str, Any]) -> dict[str, Any]:
    """What makes TRL's update that of April's `grpo` preset."""
    return {
        "output_dir": spec["out"],
        "use_cpu": True,
        "bf16": False,
        "seed": spec["seed"],
        "max_steps": spec["steps"],
        "per_device_train_batch_size": spec["groups_per_step"] * spec["group_size"],
        "num_generations": spec["group_size"],
        "max_completion_length": spec["max_new_tokens"],
        "temperature": 1.0,
        "loss_type": "grpo",
        "scale_rewards": "group",
        "beta": 0.0,
        "epsilon": 0.2,
        "learning_rate": spec["lr"],
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": spec["steps"],
        "disable_tqdm": True,
    }


def main() -> None:
    """Read the specification and print the result as the last line."""
    print(json.dumps(train(json.loads(Path(sys.argv[1]).read_text()))))


if __name__ == "__main__":
    main()
