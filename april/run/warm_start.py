"""Make a policy by supervised training: what the packaged one was made with, and anybody's own."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from april import registry
from april.config.load import load_layers
from april.config.resolve import resolve
from april.config.warm_start import Completion, Stage, Vocabulary, WarmStartRecipe
from april.core.errors import DataError, RecipeError
from april.core.random import stream_key, uniforms
from april.core.template import fill
from april.environments.base import Item, without
from april.models.policy import Policy
from april.run.build import context_tokens
from april.run.data import held_apart
from april.text.tokenizer import Tokenizer
from april.training.supervised import Example, Progress, train_supervised

OnStep = Callable[[str, int, int, Progress], None]


def resolve_warm_start(recipe: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> WarmStartRecipe:
    """Read and validate a warm-start recipe: a packaged name, a file or a tree."""
    layers = load_layers(recipe, (), overrides, folder="warm_start", defaults={})
    return registry.validate(WarmStartRecipe, layers.values, "")  # type: ignore[return-value]


def warm_start(
    recipe: WarmStartRecipe, out: Path, on_step: OnStep = lambda _stage, _done, _total, _progress: None
) -> dict[str, Any]:
    """Train and save an ordinary Hugging Face folder.

    Args:
        recipe: what to make.
        out: folder of the model; must not hold one already.
        on_step: told (stage, step, steps, progress).

    Returns:
        summary: loss of each stage, tokens, seconds, parameters.
    """
    if (out / "config.json").exists():
        raise DataError("the folder holds a model already", where=str(out), hint="choose another one with --out, or remove it")
    torch.set_num_threads(recipe.threads or torch.get_num_threads())
    policy, tokenizer = _start(recipe)
    held_out = held_apart(resolve(recipe.excludes).recipe)[1] if recipe.excludes else []
    start_s, losses, tokens = time.perf_counter(), {}, 0
    for stage in recipe.stages:
        examples = stage_examples(recipe, stage, tokenizer, held_out, context_tokens(policy))
        total = stage.training.num_steps
        done = train_supervised(policy, examples, stage.training, lambda p, s=stage, n=total: on_step(s.name, p.step + 1, n, p))
        losses[stage.name] = float(np.mean([progress.loss for progress in done[-20:]]))
        tokens += done[-1].num_tokens
    policy.save(out, tokenizer.backend)
    parameters = sum(parameter.numel() for parameter in policy.module.parameters())
    seconds = time.perf_counter() - start_s
    return {"folder": str(out), "parameters": parameters, "losses": losses, "tokens_trained": tokens, "wall_s": seconds}


def _start(recipe: WarmStartRecipe) -> tuple[Policy, Tokenizer]:
    if isinstance(recipe.model, str):
        return Policy.load(recipe.model), _tokenizer(recipe.tokenizer or recipe.model)
    if recipe.tokenizer is None:
        raise RecipeError(
            "a model with random weights has no tokenizer of its own", where="tokenizer", expected="a folder or a vocabulary"
        )
    tokenizer = _tokenizer(recipe.tokenizer)
    special = {"vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.eos_ids[0], "pad_token_id": tokenizer.pad_id}
    return Policy.from_config({**special, **recipe.model}, recipe.seed), tokenizer


def _tokenizer(source: str | Vocabulary) -> Tokenizer:
    if isinstance(source, str):
        return Tokenizer.load(source)
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    words = ("<pad>", "<eos>", "<unk>", *source.words)
    backend = Backend(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(source.pattern), "isolated")
    backend.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", clean_up_tokenization_spaces=False
    )
    return Tokenizer(wrapped)


def stage_examples(
    recipe: WarmStartRecipe, stage: Stage, tokenizer: Tokenizer, held_out: Sequence[Item], context: int
) -> list[Example]:
    """All examples of a stage: each item of its task answered in one of the stage's ways.

    Raises:
        DataError: an example that the context cannot hold, or that the tokenizer cannot write.
    """

    def text(item: Mapping[str, Any]) -> str:
        return fill(recipe.prompt.template, item, "prompt.template")

    items = without(stage.task.load(), held_out, key=text)
    ways = [(_writer(completion), completion.weight) for completion in stage.completions]
    edges = np.cumsum([weight for _, weight in ways])
    draws = uniforms([stream_key(recipe.seed, stage.name, "completions")] * len(items), np.arange(len(items)))
    examples = []
    for item, draw in zip(items, draws, strict=True):
        write = ways[int(np.searchsorted(edges, draw * edges[-1], side="right"))][0]
        prompt = tokenizer.encode(tokenizer.render(text(item), chat=recipe.prompt.chat))
        answer = write(item)
        completion = np.append(tokenizer.encode(answer), np.int32(tokenizer.eos_ids[0]))
        if len(prompt) + len(completion) > context:
            total = len(prompt) + len(completion)
            raise DataError(
                "an example is longer than the context", where=f"item {item['id']}", got=total, expected=f"<= {context} tokens"
            )
        if tokenizer.decode(completion) != answer:
            raise DataError(
                "the tokenizer cannot write a completion",
                where=f"item {item['id']}",
                got=answer,
                expected="decode(encode(text)) == text",
            )
        examples.append(Example(prompt, completion))
    return examples


def _writer(completion: Completion) -> Callable[[Mapping[str, Any]], str]:
    if completion.function is not None:
        return registry.load(completion.function)  # type: ignore[no-any-return]
    template = completion.template or ""
    return lambda item: fill(template, item, "stages.completions.template")
