"""Starting vLLM inside this process, for a model that April already holds."""

from __future__ import annotations

import copy
import os
import tempfile
from typing import Any

import torch

from april.core.errors import ResourceError
from april.engines.vllm.config import VllmConfig, VllmServerConfig

_STEP_TOKENS = 2048
BLOCK_TOKENS = 32
"""The smallest block that all of vLLM's attention kernels take, the CPU's included."""


def start_vllm(module: Any, config: VllmConfig) -> Any:
    """A `vllm.v1.engine.llm_engine.LLMEngine` of the module's shape, with random weights.

    vLLM's engine core runs in this process (no second one whose death or delay would have to be noticed), one token is
    scheduled at a time, and log-probs are those of the distribution that is sampled from.

    Raises:
        ResourceError: vLLM is not installed, or does not start.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(config.memory_gib))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    threads = torch.get_num_threads()
    try:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        from april.engines.vllm import transfer
    except ImportError as error:
        raise ResourceError(
            "vLLM cannot be imported",
            where="engine.type",
            got=str(error).splitlines()[0],
            expected="the extra april-rl[vllm]",
            hint="docs/engine_vllm.md says how to install it",
        ) from error
    transfer.register()
    with tempfile.TemporaryDirectory(prefix="april-vllm-") as folder:
        save_shape(module, folder)
        engine = LLMEngine.from_engine_args(EngineArgs(**_arguments(folder, module, config)))
    torch.set_num_threads(threads)
    return engine


def _arguments(folder: str, module: Any, config: VllmConfig) -> dict[str, Any]:
    from vllm.config.weight_transfer import WeightTransferConfig

    from april.engines.vllm.transfer import BACKEND

    arguments: dict[str, Any] = {
        "model": folder,
        "runner": "generate",
        "skip_tokenizer_init": True,
        "load_format": "dummy",
        "dtype": dtype_of(module, config),
        "enforce_eager": config.enforce_eager,
        "max_num_seqs": config.max_running,
        "max_model_len": config.max_model_tokens,
        "block_size": BLOCK_TOKENS,
        "enable_prefix_caching": config.prefix_caching,
        "async_scheduling": False,
        "scheduling_policy": "priority",
        "logprobs_mode": "processed_logprobs",
        "max_logprobs": -1,
        "disable_log_stats": True,
        "tensor_parallel_size": config.tensor_parallel,
        "gpu_memory_utilization": config.gpu_memory_fraction,
        "enable_sleep_mode": can_sleep(config),
        "weight_transfer_config": WeightTransferConfig(backend=BACKEND),
        "worker_extension_cls": "april.engines.vllm.extension.AprilWorker",
    }
    if not chunks_prefill(config):
        arguments |= {"enable_chunked_prefill": False, "max_num_batched_tokens": batched_tokens(module, config)}
    if config.kv_tokens is not None:
        arguments["num_gpu_blocks_override"] = -(-config.kv_tokens // BLOCK_TOKENS) + 1
    return arguments


def save_shape(module: Any, folder: str) -> None:
    """Write a folder that vLLM can start from with random weights."""
    shape = copy.deepcopy(module.config)
    shape.architectures = [type(module).__name__]  # a model made from a config alone does not name it
    shape.save_pretrained(folder)


def chunks_prefill(config: VllmConfig | VllmServerConfig) -> bool:
    """Whether a prompt may be read in parts, a step each.

    After a part that is not the last, vLLM rewinds the random generator of a seeded request, which generators of a CPU cannot do.
    """
    return torch.cuda.is_available() or not config.seeded


def can_sleep(config: VllmConfig | VllmServerConfig) -> bool:
    """Whether vLLM allocates memory so that it can be given back; it refuses to on a CPU."""
    return config.sleeps and torch.cuda.is_available()


def batched_tokens(module: Any, config: VllmConfig | VllmServerConfig) -> int:
    """Tokens of one step, so that any prompt fits whole."""
    context = getattr(module.config.get_text_config(), "max_position_embeddings", 0)
    return max(_STEP_TOKENS, config.max_model_tokens or int(context))


def dtype_of(module: Any, config: VllmConfig | VllmServerConfig) -> str:
    """The numerics of a recipe: its own, or the model's; vLLM has no float64."""
    own = str(next(module.parameters()).dtype).removeprefix("torch.")
    return config.dtype if config.dtype != "auto" else "float32" if own == "float64" else own


def tied_names(module: Any) -> dict[str, str]:
    """Names that share another parameter's memory -> the parameter's own name; vLLM loads each of them for itself."""
    own = {tensor.data_ptr(): name for name, tensor in module.named_parameters()}
    everything = module.named_parameters(remove_duplicate=False)
    return {name: own[tensor.data_ptr()] for name, tensor in everything if own[tensor.data_ptr()] != name}
