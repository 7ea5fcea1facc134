"""Limits that several parts share; nothing here takes time to import."""

MAX_NODES = 64  # candidates of a tree besides the root
