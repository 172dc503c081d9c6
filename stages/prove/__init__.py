"""Prove an image: digest, structure, filesystems, preflight and a boot, from where it is stored."""
