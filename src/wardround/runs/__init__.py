"""Runs: session, coordinator's context, checks, application of a model."""
