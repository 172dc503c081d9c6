"""Verification of stored images."""
