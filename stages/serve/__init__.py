"""Serve any image as a disk: a cache over its reader, a copy-on-write layer over that, and an NBD server."""
