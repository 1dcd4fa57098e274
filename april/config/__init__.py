"""Typed recipes: TOML files, overlays and dotted overrides, with the origin of every value."""
