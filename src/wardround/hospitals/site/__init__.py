"""A hospital in a federation: what it approved, what it answers, and how it stops all of it."""
