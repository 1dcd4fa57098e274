"""Where tokens come from: a protocol and its implementations."""
