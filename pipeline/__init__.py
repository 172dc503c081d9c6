"""The engine of the disk exporter; it knows no format and no store."""

__version__ = "0.1.0"
