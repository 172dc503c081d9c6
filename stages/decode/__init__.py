"""Readers of image formats; they share no code with the encoders."""
