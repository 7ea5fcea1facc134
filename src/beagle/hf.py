"""Names inside transformers that beagle relies on: asked of the installed library where it has them.

Each says in which version it was read; 5.17 to 5.24 are the versions that beagle is tested with.
"""

from __future__ import annotations

from transformers.generation import utils as _generation

# Under which names `generate` takes a KV cache and hands it to the model.
# 5.17: past_key_values, cache_params, state, mems, past_buckets_states, all of them in ALL_CACHE_NAMES.
# 5.24: cache, which the first two are renamed to when they are passed, and the last three.
CACHE_NAMES = frozenset({*_generation.ALL_CACHE_NAMES, "cache", "past_key_values", "cache_params"})

# Inputs that `generate` prepares by itself, or that change how an answer is computed but not which (5.17, 5.24);
# the cache comes on top, and 5.24 passes attention_mask=None where nothing is masked.
PREPARED_INPUTS = frozenset({"attention_mask", "position_ids", "use_cache", "logits_to_keep"})
