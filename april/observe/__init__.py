"""Everything a reader sees of a run: files, terminal, trace and report. Never imports torch."""
