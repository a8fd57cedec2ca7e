"""Methods: a policy and a few hooks each."""

from wardround.learning.methods.method import Facts, LocalRound, Method, Updates, Writers

__all__ = ["Facts", "LocalRound", "Method", "Updates", "Writers"]
