"""Credit: rewards of a batch -> advantage of every token."""
