"""Clients of stores, used by writers and readers alike."""
