"""The faults of `python -m bench.faults`: one module per part of the system, rows registered by `rows.row`."""
