"""Benchmarks against real processes; `python -m sims.bench` lists them."""
