"""The experiments of `python -m bench.paper`: what runs, what is measured of it, and the page."""
