"""Acquisitions as linear operators with exact adjoints, their noise, and solvers."""
