"""What is measured: one module a family, each with a tuple `CASES`."""
