"""Tests of stages/write."""
