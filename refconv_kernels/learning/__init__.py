"""Refocusing Learning (paper section III-C): data, networks, recipe and loop."""
