"""Text of one request as its tokens come: whole characters only, and nothing of a stop text."""

from collections.abc import Callable, Sequence


class TextStream:
    """``add(token)`` returns the text that is certain by now; ``stopped`` says that a stop text
    came; ``finish()`` returns the rest.

    The pieces joined are the decoded ids up to the first stop text. A character of which only some
    bytes are there, and text that may still become a stop text, are held back."""

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str] = ()):
        self._decode, self._stops = decode, tuple(stops)
        self._ids: list[int] = []
        self._settled, self._text = 0, ""  # tokens whose text is certain, and that text
        self._shown = 0
        self.stopped = False

    def add(self, token: int) -> str:
        self._ids.append(token)
        # decoders may look at the neighbour, e.g. for a space
        context = self._ids[max(0, self._settled - 4) : self._settled]
        before, after = self._decode(context), self._decode(context + self._ids[self._settled :])
        if not after.endswith("\ufffd") and after.startswith(before):
            self._settled = len(self._ids)
            self._text += after[len(before) :]
        return self._show(self._safe_end())

    def finish(self) -> str:
        """The text held back, once no token follows."""
        if not self.stopped:
            self._text = self._decode(self._ids)
            self._safe_end()
        return self._show(len(self._text))

    @property
    def text(self) -> str:
        """What was given out so far."""
        return self._text[: self._shown]

    def _safe_end(self) -> int:
        """How much of the text may be shown. Cuts it at the first stop text."""
        text, stops = self._text, self._stops
        starts = [text.find(stop, max(0, self._shown - len(stop))) for stop in stops]
        if matches := [at for at in starts if at >= 0]:
            self.stopped, self._text = True, text[: min(matches)]
            return len(self._text)
        begun = (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return len(text) - max(begun, default=0)

    def _show(self, end: int) -> str:
        piece = self._text[self._shown : end]
        self._shown = max(self._shown, end)
        return piece
