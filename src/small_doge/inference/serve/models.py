"""A model as the server sees it: texts that take pieces of a prompt in and give one token after another.

Both kinds can be left after any token and taken up again, which is how several requests share one model.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ...errors import UserError
from ..generate import open_engine
from .settings import ServeRecipe

if TYPE_CHECKING:
    from ..engine import Engine

PIECE = 64  # tokens of a prompt that are read in one turn; the engine reads no more in one step


@dataclass(frozen=True)
class Choice:
    """How tokens are chosen, under the names of transformers and the engine."""

    temperature: float
    top_p: float
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None


class Text(Protocol):
    """A text in progress."""

    @property
    def seen(self) -> int:
        """Tokens that were taken in."""

    def feed(self, ids: Sequence[int]) -> Any:
        """Take tokens in."""

    def tokens(self, choice: Choice, most: int) -> Iterator[int]:
        """One token after another, one that ends the text too."""


class Stream(Protocol):
    """Text out of tokens, whole characters only."""

    def push(self, token: int) -> str:
        """The text that became whole by this token, perhaps none."""

    def end(self) -> str:
        """What is left, broken characters too."""


class Served:
    """A model, its tokenizer and its chat template.

    Args:
        folder: of the model.
        kept: texts that are kept when they are done.

    Attributes:
        how: what runs it, for people.
        vocabulary: ids are below it.
        ends: tokens that end a text.
    """

    how: str
    vocabulary: int
    ends: frozenset[int]

    def __init__(self, folder: str, kept: int = 0):
        from ...data.rendering import require_chat
        from ...data.tokenizer import load_tokenizer

        self.tokenizer: Any = load_tokenizer(folder)
        self._lock = threading.Lock()  # the tokenizer is asked by several threads
        self._kept: deque[tuple[list[int], Text]] = deque(maxlen=kept)
        self.renderer, self.no_chat = None, ""
        try:
            self.renderer = require_chat(self.tokenizer, prompts=True)
        except UserError as error:
            self.no_chat = str(error)

    def text(self) -> Text:
        """A new, empty text."""
        raise NotImplementedError

    def stream(self) -> Stream:
        """A new stream."""
        raise NotImplementedError

    def begin(self, ids: list[int]) -> Text:
        """A text that has seen a part of ``ids``: the longest kept one that they continue, or a new one.

        A text cannot be taken back or copied, so it is given to one request. In the scheduler's thread.
        """
        fits = [kept for kept in self._kept if len(kept[0]) < len(ids) and ids[: len(kept[0])] == kept[0]]
        if not fits:
            return self.text()
        best = max(fits, key=lambda kept: len(kept[0]))
        self._kept.remove(best)
        return best[1]

    def keep(self, ids: list[int], text: Text) -> None:
        """Keep a text that is done, in place of the oldest; ``ids`` are all its tokens. In the scheduler's thread."""
        if text.seen:
            self._kept.append((ids[: text.seen], text))

    def encode(self, prompt: str) -> list[int]:
        """Ids of a plain prompt, with the begin token if the tokenizer adds one."""
        with self._lock:
            return self.tokenizer(prompt)["input_ids"]

    def chat(self, messages: list[dict[str, str]]) -> list[int] | None:
        """Ids of a conversation up to the reply, or None where the chat template refuses it."""
        assert self.renderer is not None, "asked only where there is a chat template"
        with self._lock:
            return self.renderer.prompts([messages])[0]


def open_served(recipe: ServeRecipe, say: Callable[[str], Any] | None = None) -> Served:
    """The model of a recipe: with the engine where that can run it, otherwise with transformers, which is said.

    Raises:
        UserError: if the folder cannot be opened, or model and tokenizer do not fit together.
    """
    engine = open_engine(recipe.model, recipe.precision, recipe.threads, say)
    if engine is None:
        served: Served = _WithTransformers(recipe.model, recipe.kept_texts)
    else:
        engine.warm()
        served = _WithEngine(recipe.model, engine, recipe.kept_texts)
    if len(served.tokenizer) > served.vocabulary:
        raise UserError(
            f"the tokenizer of {recipe.model} has {len(served.tokenizer):,} entries and its model {served.vocabulary:,}"
        )
    return served


class _WithEngine(Served):
    def __init__(self, folder: str, engine: Engine, kept: int):
        from ..engine.text import Tokenizer

        super().__init__(folder, kept)
        self.engine, self._fast = engine, Tokenizer(folder)
        self.vocabulary = engine.shape.vocabulary
        self.ends = _ends(engine.eos, self.tokenizer)
        self.how = f"the engine, {engine.precision}, {engine.threads} thread{'s' * (engine.threads > 1)}"

    def text(self) -> Text:
        return _EngineText(self.engine, self.ends)

    def stream(self) -> Stream:
        return self._fast.stream()


class _EngineText:
    def __init__(self, engine: Engine, ends: Iterable[int]):
        self._session, self._ends = engine.session(), ends

    @property
    def seen(self) -> int:
        return self._session.seen

    def feed(self, ids: Sequence[int]) -> None:
        self._session.feed(ids)

    def tokens(self, choice: Choice, most: int) -> Iterator[int]:
        from ..engine import Sampling

        sampling = Sampling(choice.temperature, choice.top_k, choice.top_p, choice.repetition_penalty)
        options: dict[str, Any] = {"max_new_tokens": most, "sampling": sampling, "seed": choice.seed}
        return self._session.generate((), stop=self._ends, **options)


class _WithTransformers(Served):
    """transformers' forward step by step, not ``generate``, which keeps a model until its text is done."""

    def __init__(self, folder: str, kept: int):
        import torch

        from ...models import load_causal_lm

        super().__init__(folder, kept)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model: Any = load_causal_lm(folder).to(device)
        self.vocabulary = self.model.config.vocab_size
        ends = getattr(self.model.generation_config, "eos_token_id", None)
        self.ends = _ends(ends if isinstance(ends, list) else [] if ends is None else [ends], self.tokenizer)
        self.how = f"transformers, {str(self.model.dtype).removeprefix('torch.')}, {device}"

    def text(self) -> Text:
        return _TransformersText(self.model, self.ends)

    def stream(self) -> Stream:
        return _TransformersStream(self.tokenizer)


class _TransformersText:
    def __init__(self, model: Any, ends: frozenset[int]):
        self._model, self._ends, self._ids = model, ends, []  # type: ignore[var-annotated]
        self._cache: Any = None
        self._logits: Any = None
        if model.config.model_type == "doge":
            from ...models import DynamicMaskCache

            self._cache = DynamicMaskCache(model.config)

    @property
    def seen(self) -> int:
        return len(self._ids)

    def feed(self, ids: Sequence[int]) -> None:
        import torch

        with torch.inference_mode():
            inputs = torch.tensor([list(ids)], device=self._model.device)
            out = self._model(input_ids=inputs, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache, self._logits = out.past_key_values, out.logits[:, -1].float()
        self._ids += ids

    def tokens(self, choice: Choice, most: int) -> Iterator[int]:
        import torch
        from transformers import generation as warpers

        steps: Any = warpers.LogitsProcessorList()
        if choice.repetition_penalty != 1:
            steps.append(warpers.RepetitionPenaltyLogitsProcessor(choice.repetition_penalty))
        if choice.temperature:
            steps.append(warpers.TemperatureLogitsWarper(choice.temperature))
            if choice.top_k:
                steps.append(warpers.TopKLogitsWarper(choice.top_k))
            if choice.top_p < 1:
                steps.append(warpers.TopPLogitsWarper(choice.top_p))
        random = torch.Generator(self._model.device)
        random.manual_seed(choice.seed) if choice.seed is not None else random.seed()
        for i in range(most):
            with torch.inference_mode():
                scores = steps(torch.tensor([self._ids], device=self._model.device), self._logits)
                if choice.temperature:
                    token = int(torch.multinomial(scores.softmax(-1), 1, generator=random))
                else:
                    token = int(scores.argmax(-1))
            yield token
            if token in self._ends or i + 1 == most:
                return
            self.feed([token])


class _TransformersStream:
    def __init__(self, tokenizer: Any):
        from ..chat import CharacterStreamer

        self._new: list[str] = []
        self._stream = CharacterStreamer(tokenizer, self._new.append)

    def push(self, token: int) -> str:
        self._stream.push(token)
        return self._taken()

    def end(self) -> str:
        self._stream.end()
        return self._taken()

    def _taken(self) -> str:
        text = "".join(self._new)
        self._new.clear()
        return text


def _ends(ids: Iterable[int], tokenizer: Any) -> frozenset[int]:
    """Tokens that end a text: those of the model, and that which the tokenizer calls its end."""
    return frozenset(ids) | ({tokenizer.eos_token_id} - {None})
