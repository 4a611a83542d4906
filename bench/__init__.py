"""Benchmarks of whole meta-steps, gated by the gradient: `python -m bench run`, `pytest bench`."""
