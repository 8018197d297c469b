"""Greedy completions on one CPU thread, with the prompt's KV cache looked up in p2pkv first and stored there afterwards.

The answer must not depend on what the cache held. Floating-point sums do depend on how a prompt is cut into forward passes, so
every prompt is cut at the same places: at multiples of `BLOCK_TOKENS`, and before its last token, which is always computed,
because its logits begin the answer. A prompt that is held whole, or up to such a place, is thus computed on in the very passes
that would have computed it without a cache: the same bits. A prefix that ends elsewhere moved logits by up to 5e-4, which
changed none of 150 answers: the likeliest two tokens are 1 apart in the median.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import structlog
import torch
from transformers import DynamicCache

from p2pkv.core.keys import Identity
from p2pkv.engines import EngineCache
from p2pkv.engines.huggingface import cache_of_kv, kv_of_cache, layout_of
from p2pkv.engines.reference.model import ReferenceModel
from p2pkv.engines.reference.text import AnswerText
from p2pkv.errors import ErrorCode, Failure, InvalidRequestError, P2pkvError

BLOCK_TOKENS = 256
"""Prompt tokens computed in one pass, some 20 ms; the default `chunk_size`, so that held chunks end where a pass does."""


class FinishReason(StrEnum):
    """Why an answer ended: the model or a stop string said so, or `max_tokens` were written."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Piece:
    """By what an answer grew.

    Attributes:
        text: Whole characters, none of which may turn out to belong to a stop string; empty only in an answer's last piece.
        tokens: The token ids since the piece before. With a stop string or a character that began in them, their text may be
            in a later piece.
    """

    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Completion:
    """An answer.

    Attributes:
        text: The answer's tokens as text, up to a stop string.
        prompt_tokens: The prompt's token ids.
        answer_tokens: The answer's token ids, at least one; the end token counts, its text is empty, and those of the stop
            string count too.
        cached_count: Prompt tokens whose KV was loaded instead of computed; at most all but the last.
        finish_reason: Why it ended.
        stop_reason: The stop string that ended it, if one did.
    """

    text: str
    prompt_tokens: tuple[int, ...]
    answer_tokens: tuple[int, ...]
    cached_count: int
    finish_reason: FinishReason
    stop_reason: str | None


class ReferenceEngine:
    """One model and, if it has one, its cache. One thread at a time may use it.

    A cache that fails never fails a completion: what it doesn't give is computed, what it doesn't take isn't kept. Each change
    is logged once, and `cache_problem` tells.

    Attributes:
        model: What it runs.
        cache_problem: Why the last completion went without the cache, or wasn't kept in it; None when all was well.
    """

    def __init__(self, model: ReferenceModel, cache: EngineCache | None, cache_problem: str | None = None) -> None:
        torch.set_num_threads(1)  # sums are cut up by the number of threads, and two engines may share two cores
        self.model = model
        self.cache_problem: str | None = None
        self._cache = cache
        self._log = structlog.get_logger(room="engine")
        self._note(cache_problem)

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with the begin token first if asked for."""
        return self.model.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Text of `tokens`; begin and end tokens have none, bytes that aren't UTF-8 become U+FFFD.

        Raises:
            InvalidRequestError: The model has no such tokens.
        """
        self._check_tokens(tokens)
        return self.model.tokenizer.decode(list(tokens))

    def read_prompt(self, prompt: str | Sequence[int], max_tokens: int) -> list[int]:
        """The token ids of a prompt that can be answered: a text's with its begin token, token ids as they are.

        Raises:
            InvalidRequestError: The prompt is empty, has tokens that the model hasn't, or is too long together with its answer.
        """
        tokens = self.tokenize(prompt) if isinstance(prompt, str) else list(prompt)
        self._check_prompt(tokens, max_tokens)
        return tokens

    def complete(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int,
        stop: Sequence[str] = (),
        identity: Identity | None = None,
        emit: Callable[[Piece], None] = lambda _: None,
        checkpoint: Callable[[], None] = lambda: None,
    ) -> Completion:
        """Answer `prompt` with the likeliest token, again and again.

        Args:
            prompt: As `read_prompt` takes it.
            max_tokens: Longest answer, at least 1.
            stop: The answer ends before any of these, none of them empty.
            identity: Who shares the cache of this prompt.
            emit: Called with each piece of the answer as soon as it is certain; what it raises ends the work.
            checkpoint: Called before each pass; what it raises ends the work.

        Raises:
            InvalidRequestError: As `read_prompt`.
        """
        tokens = self.read_prompt(prompt, max_tokens)
        answer = _Answer(AnswerText(self.model.tokenizer, tokens, stop), self.model.end_tokens, emit)
        with torch.inference_mode():
            loaded = self._load(tokens, identity)
            past = self._empty_cache() if loaded is None else loaded
            cached_count = past.get_seq_length()
            logits = self._compute_prompt(tokens, past, checkpoint)
            if self._cache is not None and loaded is not None:
                self._keep(self._cache, tokens, past, identity)
            self._compute_answer(answer, logits, past, max_tokens, checkpoint)
        return Completion(
            text="".join(answer.texts),
            prompt_tokens=tuple(tokens),
            answer_tokens=tuple(answer.tokens),
            cached_count=cached_count,
            finish_reason=FinishReason.STOP if answer.is_stopped else FinishReason.LENGTH,
            stop_reason=answer.stop_reason,
        )

    def _load(self, tokens: list[int], identity: Identity | None) -> DynamicCache | None:
        """The cache to go on from; None without p2pkv, or when it fails and should be left alone."""
        if self._cache is None:
            return None
        try:
            held_count, kv = self._cache.retrieve(tokens, identity=identity)
        except P2pkvError as error:
            self._note(f"nothing could be loaded: {error}")
            return None
        usable_count = min(held_count, len(tokens) - 1)
        return self._empty_cache() if kv is None or usable_count == 0 else cache_of_kv(kv[:, :, :usable_count])

    def _empty_cache(self) -> DynamicCache:
        """What the model fills: with layers that forget, for one that attends to a window."""
        return DynamicCache(config=self.model.network.config)

    def _keep(self, cache: EngineCache, tokens: list[int], past: DynamicCache, identity: Identity | None) -> None:
        """Store the prompt, also when all of it was found inside longer chunks: it is to be moved by its own tokens."""
        try:
            kv = kv_of_cache(past, layout_of(self.model.network.config), len(tokens))
            stored_count = cache.store(tokens, kv, identity=identity)
        except P2pkvError as error:
            self._note(f"the prompt could not be stored: {error}")
        else:
            self._note(None if stored_count == len(tokens) else "the store has no room for the whole prompt")

    def _compute_prompt(self, tokens: list[int], past: DynamicCache, checkpoint: Callable[[], None]) -> torch.Tensor:
        """Compute what `past` hasn't yet; the logits after the last token."""
        last = len(tokens) - 1
        start = past.get_seq_length()
        while start < last:
            checkpoint()
            end = min(start - start % BLOCK_TOKENS + BLOCK_TOKENS, last)
            self._compute(tokens[start:end], past)
            start = end
        checkpoint()
        return self._compute(tokens[last:], past)

    def _compute_answer(
        self, answer: "_Answer", logits: torch.Tensor, past: DynamicCache, max_tokens: int, checkpoint: Callable[[], None]
    ) -> None:
        answer.add(int(logits.argmax()))
        while len(answer.tokens) < max_tokens and not answer.is_stopped:
            checkpoint()
            answer.add(int(self._compute(answer.tokens[-1:], past).argmax()))
        answer.end()

    def _compute(self, tokens: list[int], past: DynamicCache) -> torch.Tensor:
        """Logits `[vocabulary]` after `tokens`, whose KV is appended to `past`."""
        return self.model.compute(torch.tensor([tokens]), past)

    def _note(self, problem: str | None) -> None:
        if problem == self.cache_problem:
            return
        self.cache_problem = problem
        if problem is None:
            self._log.info("the cache works again")
        else:
            self._log.warning("going without the cache", reason=problem)

    def _check_prompt(self, tokens: list[int], max_tokens: int) -> None:
        if not tokens:
            raise _invalid("the prompt is empty; give it at least one token")
        if len(tokens) + max_tokens > self.model.max_tokens:
            raise _invalid(
                f"this model's maximum context length is {self.model.max_tokens} tokens; the prompt has {len(tokens)} and"
                f" {max_tokens} are to be written; shorten either"
            )
        self._check_tokens(tokens)

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        strange = next((token for token in tokens if not 0 <= token < self.model.vocabulary_size), None)
        if strange is not None:
            raise _invalid(f"token id {strange} is none of this model's, which are 0 to {self.model.vocabulary_size - 1}")


class _Answer:
    """An answer that is being written: its tokens, and its text in the pieces that are given out."""

    def __init__(self, text: AnswerText, end_tokens: frozenset[int], emit: Callable[[Piece], None]) -> None:
        self.tokens: list[int] = []
        self.texts: list[str] = []
        self._text = text
        self._end_tokens = end_tokens
        self._emit = emit
        self._emitted_count = 0

    @property
    def stop_reason(self) -> str | None:
        return self._text.stop_reason

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string or the model ended it."""
        return self.stop_reason is not None or self.tokens[-1] in self._end_tokens

    def add(self, token: int) -> None:
        self.tokens.append(token)
        if text := self._text.add(token):
            self._give(text)

    def end(self) -> None:
        text = self._text.end()
        if text or self._emitted_count < len(self.tokens):
            self._give(text)

    def _give(self, text: str) -> None:
        self.texts.append(text)
        piece = Piece(text, tuple(self.tokens[self._emitted_count :]))
        self._emitted_count = len(self.tokens)
        self._emit(piece)


def _invalid(detail: str) -> InvalidRequestError:
    return InvalidRequestError(Failure(ErrorCode.INVALID_REQUEST, detail))
