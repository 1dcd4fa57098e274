"""Continuous batching on torch, in the process of the caller."""
