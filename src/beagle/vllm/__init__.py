"""Beagle heads in stock vLLM: a plugin (entry point group ``vllm.general_plugins``), export and start.

Only ``model.py``, ``plugin.py`` and ``greedy.py`` import vLLM, and only vLLM imports those.
"""
