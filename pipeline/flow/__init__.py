"""The flow of a run: items, buffers, channels, stages, engine."""
