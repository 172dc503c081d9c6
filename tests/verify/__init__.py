"""Tests of stages/verify."""
