"""The policy: Hugging Face causal LMs, and a lean forward for common shapes."""
