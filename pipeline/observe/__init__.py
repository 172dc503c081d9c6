"""Subscribers of the event stream."""
