"""Tokenizers and prompts: token in, token out; a response is never tokenised again."""
