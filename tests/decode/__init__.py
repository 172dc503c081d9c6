"""Tests of stages/decode."""
