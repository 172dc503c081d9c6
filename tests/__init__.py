"""The test suite. It mirrors the packages."""
