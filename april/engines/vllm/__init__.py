"""vLLM as an engine: its own scheduler and kernels behind April's protocol (extra `april-rl[vllm]`)."""
