"""Disks that tests, the demo and the benchmarks build for themselves."""
