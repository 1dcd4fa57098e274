"""Commands: thin, and quick to start; each imports what it needs when it runs."""
