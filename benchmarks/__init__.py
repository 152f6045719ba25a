"""Benchmarks; each is a module that prints what it measured and the command that does it."""
