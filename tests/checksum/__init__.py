"""Tests of stages/checksum."""
