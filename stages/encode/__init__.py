"""Encoders of image formats."""
