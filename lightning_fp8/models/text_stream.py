"""Text from tokens as they come: whole characters only, and nothing from a stop string on."""

from collections.abc import Callable, Sequence

_LONGEST_CHARACTER = 4  # bytes, hence tokens at most


class TextStream:
    """Decodes one token after the other.

    A character's bytes may be several tokens: they are held back until it is whole. So is text that may be the
    beginning of a stop string. Costs the same for every token, however long the text has become.

    Args:
        decode: Token ids -> text.
        prompt: The token ids before the first one; they only tell how to decode what follows.
        stops: Texts that end the stream; they are not part of it.
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt: Sequence[int], stops: Sequence[str] = ()) -> None:
        self.ended = False
        self._decode, self._stops = decode, [stop for stop in stops if stop]
        self._context = list(prompt[-_LONGEST_CHARACTER:])
        self._tokens: list[int] = []
        self._held = ""

    def push(self, token: int) -> str:
        """The text that is certain now that `token` has come; may be empty."""
        if self.ended:
            return ""
        self._tokens.append(token)
        text = self._decode(self._context + self._tokens)[len(self._decode(self._context)) :]
        if text.endswith("\ufffd") and len(self._tokens) < _LONGEST_CHARACTER:
            return ""
        self._context, self._tokens = (self._context + self._tokens)[-_LONGEST_CHARACTER:], []
        return self._release(text)

    def _release(self, text: str) -> str:
        self._held += text
        found = [place for place in (self._held.find(stop) for stop in self._stops) if place >= 0]
        if found:
            self.ended = True
            out, self._held = self._held[: min(found)], ""
            return out
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out

    def _overlap(self, stop: str) -> int:
        """How much of the end of the held text may be the beginning of `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if stop.startswith(self._held[-n:])), 0)

    def flush(self) -> str:
        """What was held back, once no more tokens come; without the bytes of an unfinished character."""
        out, self._held, self.ended = self._held, "", True
        return out
