"""An answer's text as its tokens come: whole characters only, and nothing of the stop string that ends it.

A token may end inside a character, and a stop string may begin in one token and end in another. What isn't certain yet is held
back, so that the parts given out are, joined, the answer's text: a reader never has to take anything back.
"""

from collections.abc import Sequence

from tokenizers import Tokenizer

UNFINISHED = "\ufffd"
"""What a tokenizer makes of bytes that are no character; at the end of a text, perhaps not yet."""
PRIMING_TOKENS = 5
"""Of the prompt, decoded with the answer's first token; as many as vLLM takes."""


class AnswerText:
    """The text of one answer.

    Args:
        tokenizer: Of the model.
        prompt: What the answer goes on from.
        stop: Strings that end it, none of them empty.

    Attributes:
        stop_reason: The stop string that the answer came to; None until it does. No token may be added then.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self.stop_reason: str | None = None
        self._stop = stop
        self._characters = _Characters(tokenizer, prompt[-PRIMING_TOKENS:])
        self._held = ""

    def add(self, token: int) -> str:
        """Take the next token; the text that is certain now and wasn't before."""
        return self._certain(self._characters.add(token))

    def end(self) -> str:
        """All that was held back, as no token follows; what is no character stays U+FFFD."""
        certain = self._certain(self._characters.end())
        if self.stop_reason is None:
            certain, self._held = certain + self._held, ""
        return certain

    def _certain(self, text: str) -> str:
        """What of the held text and `text` no stop string can take back any more."""
        self._held += text
        if (ending := self._first_stop()) is not None:
            begin, self.stop_reason = ending
            certain, self._held = self._held[:begin], ""
        else:
            count = len(self._held) - self._beginning_nchars()
            certain, self._held = self._held[:count], self._held[count:]
        return certain

    def _first_stop(self) -> tuple[int, str] | None:
        """Where the stop string begins that is complete first, however the text came in tokens; of several the longest."""
        found = [(self._held.find(stop), stop) for stop in self._stop]
        return min(
            ((begin, stop) for begin, stop in found if begin >= 0),
            key=lambda each: (each[0] + len(each[1]), each[0]),
            default=None,
        )

    def _beginning_nchars(self) -> int:
        """Characters at the end of the held text with which a stop string could begin."""
        longest = min(len(self._held), max(map(len, self._stop), default=0))
        return next((count for count in range(longest, 0, -1) if self._is_beginning(self._held[-count:])), 0)

    def _is_beginning(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stop)


class _Characters:
    """Tokens to text, a few at a time.

    A decoder may treat the first token of a text specially (Llama 2's drops its leading space), so new tokens are decoded after
    those that came before them, and what these alone give is cut off.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._before = [] if tokenizer.decode(list(before)).endswith(UNFINISHED) else list(before)
        self._new: list[int] = []

    def add(self, token: int) -> str:
        self._new.append(token)
        text = self._new_text()
        if not text or text.endswith(UNFINISHED):
            return ""
        self._before, self._new = self._new, []
        return text

    def end(self) -> str:
        return self._new_text()

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._before)
        return self._tokenizer.decode(self._before + self._new)[len(before) :]
