"""Measures the product against the tools it replaces. `perf/README.md` has the method."""
