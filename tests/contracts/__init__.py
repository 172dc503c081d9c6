"""Suites that run over the whole catalog."""
