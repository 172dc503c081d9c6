"""Zero finding."""
