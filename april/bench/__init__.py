"""Benchmarks: every speed that April claims, with the command that measures it."""
