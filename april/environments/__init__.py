"""Tasks: where problems and their answers come from."""
