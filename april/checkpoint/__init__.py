"""What survives a crash: a journal of every transition and atomic checkpoint folders."""
