"""The policy: a Hugging Face causal LM and the log-probs of response tokens under it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from april.core.errors import DataError, ModelError
from april.models.adapters import Adapters, MergedWeights, copied_adapters, is_adapter_folder, read_adapter, with_adapters
from april.models.lean import LeanModel
from april.models.lora_config import LoraConfig
from april.models.routing import Routing, padded_routes
from april.models.sequences import PackedSequences

LOGIT_ELEMENTS = 1 << 24
"""Logits held at once; beyond it they are computed in chunks, again in the backward pass."""


class ResponseLogprobs(NamedTuple):
    """What a policy says about N packed response tokens: log-probs (N,), and entropies (N,) in nats or None."""

    logprobs: Tensor
    entropies: Tensor | None


class Policy:
    """A causal LM that can be trained.

    Attributes:
        module: the Hugging Face model; its parameters are the policy's weights.
        device, dtype: where and in what precision the weights are.
        adapters: low-rank adapters, where only those are trained.
    """

    def __init__(self, module: nn.Module, *, gradient_checkpointing: bool = False, autocast: bool = False) -> None:
        """Take over a Hugging Face causal LM.

        Args:
            module: the model, on its device.
            gradient_checkpointing: recompute layers in the backward pass to save memory.
            autocast: run forwards in bfloat16 while weights stay as they are (CUDA).
        """
        self.module: Any = module
        parameter = next(module.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self._autocast = autocast and self.device.type == "cuda"
        module.eval()
        self._gradient_checkpointing = gradient_checkpointing
        self._lean = LeanModel.from_module(module)
        self._routing: Routing | None = None
        if gradient_checkpointing and self._lean is None:
            _checkpoint_layers(module)
        self.adapters = Adapters.of(module)

    @staticmethod
    def load(
        path: str | Path,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        gradient_checkpointing: bool = False,
        autocast: bool = False,
    ) -> Policy:
        """A policy from a Hugging Face folder or hub name; from a folder of adapters their base with them merged in.

        Raises:
            ModelError: when it cannot be read as a causal LM.
        """
        module = _read_module(str(path), dtype)
        return Policy(module.to(device), gradient_checkpointing=gradient_checkpointing, autocast=autocast)

    @staticmethod
    def from_config(
        config: Mapping[str, Any] | Any, seed: int, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> Policy:
        """A policy with random weights; the same for the same config and seed.

        Args:
            config: a Hugging Face config, or a mapping with `model_type` and its fields.
            seed: of the weights; the global random state is left as it was.
        """
        from transformers import AutoConfig, AutoModelForCausalLM

        if isinstance(config, Mapping):
            config = AutoConfig.for_model(**config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
        return Policy(module.to(device=device, dtype=dtype))

    def save(self, folder: str | Path, tokenizer: Any = None) -> None:
        """Write an ordinary Hugging Face folder (of adapters one of `peft`), with the tokenizer where one is given."""
        if self.adapters is not None:
            self.adapters.save(folder, self.weights())
        else:
            with no_progress_bars():
                self.module.save_pretrained(str(folder))
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))

    @property
    def packed(self) -> bool:
        """Whether sequences run packed, without padding."""
        return self._lean is not None

    def weights(self) -> dict[str, Tensor]:
        """What engines get: Hugging Face name -> tensor, or adapters only; detached and not copied."""
        return self.state() if self.adapters is None else self.adapters.published(self.state())

    def state(self) -> dict[str, Tensor]:
        """What is trained, under the module's own names; detached and not copied."""
        left_out = set() if self.adapters is None else frozen_names(self.module)
        return {name: tensor.detach() for name, tensor in self.module.state_dict().items() if name not in left_out}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave, or the parts of this rank.

        Raises:
            RuntimeError: it is of another policy.
        """
        left_out = set() if self.adapters is None else frozen_names(self.module)
        missing, unexpected = self.module.load_state_dict(dict(state), strict=False)
        if unexpected or set(missing) - left_out:
            other = [*unexpected, *sorted(set(missing) - left_out)][0]
            raise RuntimeError(f"{'unknown' if unexpected else 'missing'} tensor {other}")

    def adapted(self, config: LoraConfig) -> Policy:
        """A policy of which only new adapters are trained, on this one's weights in the same memory.

        Raises:
            ModelError: it lacks a target, or has adapters already.
            ResourceError: `peft` is not installed.
        """
        module = with_adapters(self.module, config)
        return Policy(module, gradient_checkpointing=self._gradient_checkpointing, autocast=self._autocast)

    def response_logprobs(self, sequences: PackedSequences, temperatures: Tensor, *, entropy: bool = False) -> ResponseLogprobs:
        """Log-probs of all response tokens, in float32 at least, each at its own temperature.

        Only hidden states that predict a response token go through the vocabulary projection.

        Args:
            sequences: S sequences with N response tokens.
            temperatures: (N,), above 0.
            entropy: also the entropy of each distribution.

        Raises:
            DataError: a temperature that is not above 0: a greedy token has log-prob 0 whatever the policy.
        """
        if len(temperatures) and float(temperatures.min()) <= 0:
            raise DataError(
                "greedy samples cannot be trained on", where="temperature", got=float(temperatures.min()), expected="above 0"
            )
        sequences, temperatures = sequences.to(self.device), temperatures.to(self.device)
        context = torch.autocast("cuda", torch.bfloat16) if self._autocast else nullcontext()
        with context:
            hidden, targets = self._hidden(sequences)[sequences.rows], sequences.targets
            parts = [
                self._chunk(hidden[rows], targets[rows], temperatures[rows], entropy, last)
                for rows, last in self._chunks(len(sequences.rows))
            ]
        if not parts:
            empty = hidden.sum() * hidden.new_zeros(0)
            return ResponseLogprobs(empty, empty if entropy else None)
        logprobs = torch.cat([part[0] for part in parts])
        return ResponseLogprobs(logprobs, torch.cat([part[1] for part in parts]) if entropy else None)

    def response_hidden(self, sequences: PackedSequences) -> Tensor:
        """(N, D): the final hidden state that predicts each response token, with gradient, for a head of one's own."""
        return self._response_hidden(sequences)

    def _response_hidden(self, sequences: PackedSequences) -> Tensor:
        sequences = sequences.to(self.device)
        with torch.autocast("cuda", torch.bfloat16) if self._autocast else nullcontext():
            return self._hidden(sequences)[sequences.rows]

    def response_values(self, sequences: PackedSequences) -> Tensor:
        """(N,): what the module's `value_head` says to those hidden states, in float32 at least."""
        head = self.module.value_head
        values: Tensor = head(self._response_hidden(sequences).to(head.weight.dtype))[:, 0]
        return values if values.dtype == torch.float64 else values.float()

    def copy(self) -> Policy:
        """An independent policy with the same weights; one of adapters shares the base."""
        module = copy.deepcopy(self.module) if self.adapters is None else copied_adapters(self.module)
        return Policy(module, gradient_checkpointing=self._gradient_checkpointing, autocast=self._autocast)

    def _hidden(self, sequences: PackedSequences) -> Tensor:
        if self._lean is not None:
            if sequences.routes is not None:
                Routing.of(self.module)  # says that there are no experts
            # float64 is for exact comparisons, and its norms pass through float32: rounding would depend on who shares
            common = sequences.prompt_numbers if self.dtype != torch.float64 else ()
            shared = zip(common, sequences.prompt_lengths, strict=True) if common else ()
            return self._lean.packed_hidden(
                sequences.token_ids,
                sequences.lengths,
                gradient_checkpointing=self._gradient_checkpointing,
                prefixes=tuple(shared),
            )
        lengths = torch.tensor(sequences.lengths, device=self.device)
        width = int(lengths.max()) if len(lengths) else 0
        inside = torch.arange(width, device=self.device) < lengths[:, None]
        padded = torch.zeros(inside.shape, dtype=torch.int64, device=self.device)
        padded[inside] = sequences.token_ids
        if sequences.routes is not None and self._routing is None:
            self._routing = Routing.of(self.module)
        if self._routing is not None:
            self._routing.replay(None if sequences.routes is None else padded_routes(sequences.routes, inside))
        output = self.module.base_model(input_ids=padded, attention_mask=inside.to(torch.int64), use_cache=False)
        return output.last_hidden_state[inside]  # type: ignore[no-any-return]

    def _chunks(self, num_rows: int) -> Iterator[tuple[slice, bool]]:
        """Slices of at most LOGIT_ELEMENTS logits, and whether everything fits in one."""
        size = max(1, LOGIT_ELEMENTS // int(self.module.config.get_text_config().vocab_size))
        for start in range(0, num_rows, size):
            yield slice(start, min(start + size, num_rows)), num_rows <= size

    def _chunk(self, hidden: Tensor, targets: Tensor, temperatures: Tensor, entropy: bool, only: bool) -> tuple[Tensor, Tensor]:
        if only or not torch.is_grad_enabled():
            return self._token_logprobs(hidden, targets, temperatures, entropy)
        return checkpoint(self._token_logprobs, hidden, targets, temperatures, entropy, use_reentrant=False)  # type: ignore[no-any-return]

    def _token_logprobs(self, hidden: Tensor, targets: Tensor, temperatures: Tensor, entropy: bool) -> tuple[Tensor, Tensor]:
        logits = self._logits(hidden)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        scaled = logits / temperatures.to(logits.dtype)[:, None]
        normaliser = scaled.logsumexp(-1)
        logprobs = scaled.gather(-1, targets[:, None])[:, 0] - normaliser
        entropies = normaliser - (scaled.softmax(-1) * scaled).sum(-1) if entropy else logprobs.detach()
        return logprobs, entropies

    def _logits(self, hidden: Tensor) -> Tensor:
        if self._lean is not None:
            return self._lean.logits(hidden)
        logits: Tensor = self.module.get_output_embeddings()(hidden)
        config = self.module.config.get_text_config()
        # what Cohere, Granite and Gemma do to logits after the projection
        logits = logits * (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        cap = getattr(config, "final_logit_softcapping", None)
        return cap * torch.tanh(logits / cap) if cap else logits


class WithoutAdapters(Policy):
    """The base of a policy with adapters, as a policy that is not trained; no second copy."""

    def __init__(self, policy: Policy) -> None:
        self._whole, self.module, self.device, self.dtype = policy, policy.module, policy.device, policy.dtype
        self.adapters, self._lean = None, policy._lean

    def response_logprobs(self, sequences: PackedSequences, temperatures: Tensor, *, entropy: bool = False) -> ResponseLogprobs:
        """See `Policy.response_logprobs`."""
        with self._whole.adapters.off() if self._whole.adapters is not None else nullcontext():
            return self._whole.response_logprobs(sequences, temperatures, entropy=entropy)


def frozen_names(module: nn.Module) -> set[str]:
    """Names of the parameters that are not trained."""
    return {name for name, tensor in module.named_parameters(remove_duplicate=False) if not tensor.requires_grad}


def _read_module(path: str, dtype: torch.dtype) -> Any:
    """The causal LM in a folder, or of a hub name; a folder of adapters is merged into its base."""
    from transformers import AutoModelForCausalLM

    if is_adapter_folder(path):
        base, adapters = read_adapter(path)
        merged = _read_module(base, dtype)
        merged.load_state_dict(dict(MergedWeights(merged.state_dict(), adapters)))
        merged.name_or_path = path  # further adapters are on top of these
        return merged
    try:
        with no_progress_bars():
            return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            "the policy cannot be loaded",
            where=path,
            got=str(error).splitlines()[0],
            expected="a folder with config.json and weights",
            hint="where it is the base of adapters, adapter_config.json names it: base_model_name_or_path",
        ) from error


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep the library's own bars out of our terminal."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _checkpoint_layers(module: Any) -> None:
    """Recompute layers in the backward pass. The library does so only in training mode, so dropout is turned off."""
    module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    module.train()
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        if isinstance(getattr(part, "attention_dropout", None), float):
            part.attention_dropout = 0.0
