"""Runs: from a resolved recipe to a folder of results."""
