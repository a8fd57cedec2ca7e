"""Runs a study: the one place that knows every room."""
