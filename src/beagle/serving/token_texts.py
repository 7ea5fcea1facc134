"""What each token of an answer adds to its text, in bytes: a character may span several tokens."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from beagle.decoding.text import BEFORE, special_texts

UNFINISHED = "\ufffd"  # what tokenizers decode bytes to that are no whole character
BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}


@dataclass(frozen=True)
class TokenText:
    """A token behind the ones before it.

    Attributes:
        text: its text; of bytes that are no whole characters ``bytes:\\xf0\\x9f``, as OpenAI has it.
        content: UTF-8 of what it adds to the answer's text, nothing for special tokens.
        start: characters of the answer before the first that has some of its bytes.
        end: characters of the answer up to the last that has some of its bytes.
    """

    text: str
    content: bytes
    start: int
    end: int


class TokenTexts:
    """The texts of one answer's tokens, as they come.

    Of tokens that hold whole characters the text is what the tokenizer's decoder makes of them behind the
    tokens before them; of others the bytes are the tokenizer's own (see ``token_bytes``).
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = (), ends: Collection[int] = ()) -> None:
        """
        Args:
            before: tokens whose text this one continues, see ``decoding.text.StopText``.
            ends: tokens that end the answer: like special tokens they add nothing to it.
        """
        self._tokenizer = tokenizer
        self._special = special_texts(tokenizer)
        self._hidden = self._special.keys() | set(ends)
        self._decoders = decoder_types(tokenizer)
        # the last tokens, enough to decode the next ones behind them
        self._window = [token for token in before if token not in self._special][-BEFORE:]
        self._read = len(self._window)  # of the window: tokens before the ones of an unfinished character
        self._known = self._decode(self._window) if self._window else ""  # the window's text
        self._finished = len(self._known)  # characters of it
        self._before = -self._finished  # characters of the answer before the window

    def name(self, token: int) -> str:
        """A token's entry in the vocabulary."""
        return str(self._tokenizer.convert_ids_to_tokens(token) or f"token_id:{token}")

    def look(self, token: int) -> TokenText:
        """A token that might come next."""
        return self._look(token)[0]

    def add(self, token: int) -> TokenText:
        """The token that comes next."""
        found, text = self._look(token)
        if token not in self._hidden:
            self._window.append(token)
            if text.endswith(UNFINISHED):
                self._finished, self._known = self._finished_with(text), text
            else:
                self._window = self._window[self._read :]
                self._read, self._known = len(self._window), self._decode(self._window)
                self._finished = len(self._known)
                self._before += len(text) - len(self._known)
        return found

    def _finished_with(self, text: str) -> int:
        """Finished characters of the window; bytes behind them may make its whole run of bytes look unfinished."""
        return max(len(text.rstrip(UNFINISHED)), self._finished)

    def _look(self, token: int) -> tuple[TokenText, str]:
        """The token, and the window's text with it."""
        old = self._known
        if token in self._hidden:
            at = self._before + self._finished
            name = self._special.get(token) or shown(self._own(token)) or self.name(token)
            return TokenText(name, b"", at, at), old
        text = self._decode([*self._window, token])
        new = text[len(old) :] if text.startswith(old) else None
        own = self._own(token, new) if new is None or UNFINISHED in old[-1:] + new else new.encode()
        ended = new is not None and not text.endswith(UNFINISHED)  # what was unfinished stays so
        start = self._before + (len(old) if ended else self._finished)
        end = self._before + (self._finished_with(text) + 1 if text.endswith(UNFINISHED) else len(text))
        return TokenText(shown(own) or self.name(token), own, start, end), text

    def _own(self, token: int, text: str | None = None) -> bytes:
        """The token's own bytes; where it is text, ``text``, or what it is alone."""
        content = token_bytes(self.name(token), self._decoders)
        return content if content is not None else (self._decode([token]) if text is None else text).encode()

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))


def decoder_types(tokenizer: Any) -> frozenset[str]:
    """What the decoder of a tokenizer consists of: ``ByteLevel``, ``ByteFallback``, …"""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is not None:
        return frozenset(re.findall(r'"type":\s*"(\w+)"', decoder.__getstate__().decode()))
    # tokenizers in Python: of SentencePiece, or with GPT-2's table
    return frozenset(["ByteLevel" if hasattr(tokenizer, "byte_decoder") else "ByteFallback"])


def token_bytes(name: str, decoders: frozenset[str]) -> bytes | None:
    """The bytes of a token that may hold part of a character.

    Returns:
        None where the token is text: neither of a byte-level tokenizer, nor a byte ``<0xF0>`` of SentencePiece.
    """
    if "ByteLevel" in decoders:
        known = all(character in BYTE_OF for character in name)
        return bytes(BYTE_OF[character] for character in name) if known else name.encode()
    byte = re.fullmatch("<0x([0-9A-Fa-f]{2})>", name) if "ByteFallback" in decoders else None
    return bytes.fromhex(byte[1]) if byte else None


def shown(content: bytes) -> str:
    """Bytes as a text that tells different ones apart."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def first_characters(content: bytes, count: int) -> bytes:
    """The first characters' bytes; those that end a character begun before count as one."""
    starts = [i for i, byte in enumerate(content) if i == 0 or byte & 0xC0 != 0x80]
    return content[: starts[max(count, 0)]] if count < len(starts) else content
