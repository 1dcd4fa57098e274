"""Reward transforms: the rewards of a batch -> other rewards, before any group statistics."""
