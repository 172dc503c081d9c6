"""Tests of pipeline/observe."""
