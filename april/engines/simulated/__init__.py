"""Many model replicas behind one engine in virtual time: the time of decoding is computed, tokens are not."""
