"""Checkers of image formats: every invariant that a reader relies on, and those that it does not need."""
