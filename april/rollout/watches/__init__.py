"""Watches: what each sample may spend, and which are ended early."""
