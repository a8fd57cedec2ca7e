"""Methods: a policy and a few hooks each."""

from wardround.learning.methods.method import Facts, LocalRound, Method, Writers

__all__ = ["Facts", "LocalRound", "Method", "Writers"]
