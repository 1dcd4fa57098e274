"""Rewards: the judgement of one finished sample."""
