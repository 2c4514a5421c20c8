"""The parts of `python -m bench.pipeline`."""
