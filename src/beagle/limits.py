"""Limits that several parts share; nothing here takes time to import."""

MAX_NODES = 64  # candidates of a tree besides the root
MAX_TREE_TOKENS = MAX_NODES + 1  # tokens of a tree: its candidates and the root
