"""Readers of files: each filesystem as a `stages.disk.tree.FileTree` over any RangeReader, without mounting it."""
