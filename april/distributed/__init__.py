"""Parts of a run in processes of their own."""
