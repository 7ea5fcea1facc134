"""From an answer's tokens to its text, piece by piece, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BEFORE = 8  # tokens of a text that is continued


class StopText:
    """Decodes tokens as they come, and ends the text before the first stop string.

    A stop string is looked for in the text as it is shown, without special tokens, and in the text with
    the special tokens' own texts (``<|im_end|>``, say). Only what may still become a stop string or a
    whole character is held back.

    Attributes:
        stopped: a stop string has ended the text.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = (), before: Sequence[int] = ()) -> None:
        """
        Args:
            before: tokens whose text this text continues: a space between the two is kept.
        """
        self.stopped = False
        self._tokenizer, self._stops = tokenizer, list(stops)
        self._special = special_texts(tokenizer)
        # the last tokens, enough to decode the next ones behind them
        self._window = [token for token in before if token not in self._special][-BEFORE:]
        self._read = len(self._window)  # of the window: tokens whose text is known
        self._known = self._decode(self._window) if self._window else ""  # their text
        self._held: list[tuple[str, bool]] = []  # characters not given out yet; False: part of a special token

    def add(self, tokens: Sequence[int], ends: bool = False) -> tuple[str, int]:
        """Take the answer's next tokens.

        Args:
            ends: the last token ends the answer (EOS, say): it is not in the text.
        Returns:
            What is sure to be in the text, and how many of the tokens belong to the answer: fewer than
            were given where a stop string is complete before the last one.
        """
        shown = ""
        for n, token in enumerate(tokens, 1):
            if token in self._special or (ends and n == len(tokens)):
                if self._stops:
                    self._held += [(c, False) for c in self._special.get(token) or self._decode([token])]
            else:
                self._held += [(c, True) for c in self._new_text(token)]
            shown += self._give_out()
            if self.stopped:
                return shown, n
        return shown, len(tokens)

    def finish(self) -> str:
        """The answer ends here: what was held back, which is nothing after a stop string."""
        if self.stopped:
            return ""
        rest = "".join(c for c, visible in self._held if visible) + self._decode(self._window)[len(self._known) :]
        self._held, self._window, self._read, self._known = [], [], 0, ""
        return rest

    def _new_text(self, token: int) -> str:
        """What the token adds to the text, unfinished characters left out."""
        self._window.append(token)
        text = self._decode(self._window)
        sure = text.rstrip("\ufffd")
        new = sure[len(self._known) :]
        if new and sure == text:
            self._window = self._window[self._read :]  # the tokens of one piece stay before those of the next
            self._read, self._known = len(self._window), self._decode(self._window)
        elif new:
            self._known = sure
        return new

    def _give_out(self) -> str:
        """Visible characters up to a stop string, or up to what may become one."""
        everything = range(len(self._held))
        ways = [everything, [i for i in everything if self._held[i][1]]]  # with special tokens, and without
        if len(ways[1]) == len(self._held):
            del ways[0]
        cuts, safe = [], len(self._held)
        for way in ways if self._stops else []:
            text = "".join(self._held[i][0] for i in way)
            cuts += [way[at] for stop in self._stops if (at := text.find(stop)) >= 0]
            begun = max(begun_length(text, stop) for stop in self._stops)
            safe = min(safe, way[len(text) - begun] if begun else len(self._held))
        if cuts:
            self.stopped, safe = True, min(cuts)
        shown = "".join(c for c, visible in self._held[:safe] if visible)
        self._held = self._held[safe:]
        return shown

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))


def begun_length(text: str, stop: str) -> int:
    """Characters at the end of the text that a stop string begins with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def special_texts(tokenizer: Any) -> dict[int, str]:
    """Tokens that are left out of a decoded text, and what they look like."""
    special = {token: str(added) for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return special | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
