"""Compressors: the image as a stream of independent frames that the standard tools unpack."""
