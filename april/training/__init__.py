"""From groups to the next version of the weights."""
