"""The OpenAI-compatible server; needs the extra ``serve``."""
