"""What an engine is asked for, what it returns, and what runs in between."""

import dataclasses
from collections.abc import Callable, Sequence

from flexmemory.errors import UserError
from flexmemory.runtime.rows import Ticket
from flexmemory.runtime.stream import TextStream

OnToken = Callable[[int, int], object]  # number of the request, token id
OnText = Callable[[int, str], object]  # number of the request, piece of text


@dataclasses.dataclass(frozen=True)
class Request:
    """What to continue and how. ``prompt``: text or token ids; an empty one starts after an end of
    document. temperature 0 takes the likeliest token. stop: texts that end the generation and are
    not part of it. Raises UserError for values out of range."""

    prompt: str | Sequence[int]
    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_at_eos: bool = True

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UserError(f"max_tokens: {self.max_tokens} must be above 0")
        if not self.temperature >= 0:
            raise UserError(f"temperature: {self.temperature} must not be negative")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p: {self.top_p} must be above 0 and at most 1")
        if not 0 <= self.seed < 1 << 32:
            raise UserError(f"seed: {self.seed} must be in 0..{(1 << 32) - 1}")
        if isinstance(self.stop, str) or not all(self.stop):
            raise UserError(f"stop: {self.stop!r}; give a list of texts, none of them empty")


@dataclasses.dataclass(frozen=True)
class Generation:
    """One finished request. ``ids`` are the new tokens, the end of document included where it came;
    ``text`` ends before a stop text."""

    text: str
    ids: list[int]
    prompt_ids: list[int]
    stop: str  # eos | length | stop


@dataclasses.dataclass(eq=False)
class Running:
    """A request in a slot of the batch."""

    number: int
    request: Request
    prompt_ids: list[int]
    stream: TextStream | None
    eos_id: int | None  # the token that ends it
    slot: int = -1
    filled: int = 0  # prompt tokens in the cache
    ticket: Ticket | None = None  # rows of the next prompt chunk
    ids: list[int] = dataclasses.field(default_factory=list)

    @property
    def position(self) -> int:
        """Where the next token goes into the cache."""
        prompt = len(self.prompt_ids)
        return self.filled if self.filled < prompt else prompt + len(self.ids) - 1

    @property
    def length(self) -> int:
        """Tokens of prompt and generation at most."""
        return len(self.prompt_ids) + self.request.max_tokens

    def goes_on(self, token: int) -> bool:
        """Whether a token comes after ``token``, as far as can be said before its text is known."""
        return len(self.ids) + 1 < self.request.max_tokens and token != self.eos_id

    def accept(self, token: int, on_token: OnToken | None, on_text: OnText | None) -> str:
        """Takes the next token. Returns why the request ends with it, "" where it goes on."""
        more = self.goes_on(token)
        self.ids.append(token)
        piece, stopped = "", False
        if self.stream:
            piece, stopped = self.stream.add(token), self.stream.stopped
        end = "eos" if token == self.eos_id else "stop" if stopped else "" if more else "length"
        if on_token:
            on_token(self.number, token)
        if end and self.stream:
            piece += self.stream.finish()
            if self.stream.stopped and end == "length":
                end = "stop"
        if on_text and piece:
            on_text(self.number, piece)
        return end

    def generation(self, end: str) -> Generation:
        text = self.stream.text if self.stream else ""
        return Generation(text, self.ids, self.prompt_ids, end)


IDLE = Running(0, Request(""), [], None, None)  # an empty slot of the batch
