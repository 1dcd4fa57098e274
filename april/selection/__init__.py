"""Which prompt is worked on next, and by how many samples."""
