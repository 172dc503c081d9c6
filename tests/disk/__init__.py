"""Tests of stages/disk."""
