"""Benchmarks. Each file runs alone as `python -m bench.NAME` and appends a row to bench/results/."""
