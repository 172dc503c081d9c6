"""Tests of proving images."""
