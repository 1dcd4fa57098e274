"""What turns rewards and log-probs into a loss: one atom per slot, configured in `spec`, computed by pure functions."""
