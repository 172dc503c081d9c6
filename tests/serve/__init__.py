"""Tests of serving images."""
