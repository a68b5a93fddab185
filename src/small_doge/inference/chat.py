"""Talking with a model on the terminal: its chat template, transformers' generation, and one cache for all turns."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import artifacts
from ..errors import UserError

HELP = "/reset begins anew, /exit leaves, Ctrl-C stops a reply"
# Stages whose models have been taught to answer. A folder of another stage holds a base model, whatever template its
# tokenizer carries; one without a record came from elsewhere, and its template is taken at its word.
_TAUGHT = ("sft", "dpo", "grpo")


@dataclass
class ChatRecipe:
    """A model and transformers' sampling options under their own names."""

    model: str = field(metadata={"help": "model folder, of `doge sft` or `doge dpo`"})
    system: str | None = field(default=None, metadata={"help": "what the model is told before the conversation"})
    max_new_tokens: int = field(default=512, metadata={"help": "tokens of a reply at most"})
    do_sample: bool = field(default=True, metadata={"help": "sample; false takes the likeliest token each time"})
    temperature: float = field(default=0.7, metadata={"help": "below 1 sharper, above 1 flatter"})
    top_k: int = field(default=0, metadata={"help": "sample from the k likeliest tokens only; 0 for all"})
    top_p: float = field(default=0.9, metadata={"help": "sample from the likeliest tokens that make up this mass"})
    repetition_penalty: float = field(default=1.0, metadata={"help": "above 1 makes repeating less likely"})
    seed: int | None = field(default=None, metadata={"help": "makes sampling repeatable"})

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` is {self.max_new_tokens}, expected at least 1")
        if self.do_sample and self.temperature <= 0:
            raise ValueError(f"`temperature` is {self.temperature}, expected more than 0 (or --do_sample false)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` is {self.top_p}, expected more than 0 and at most 1")
        if self.repetition_penalty <= 0:
            raise ValueError(f"`repetition_penalty` is {self.repetition_penalty}, expected more than 0")

    def options(self) -> dict[str, Any]:
        """Keyword arguments of ``generate``."""
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": self.do_sample}
        options["repetition_penalty"] = self.repetition_penalty
        if self.do_sample:
            options |= {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        return options


def chat(recipe: ChatRecipe) -> None:
    """Read lines and answer them until /exit or the end of the input.

    Raises:
        UserError: if the model or its tokenizer cannot be opened or do not fit together, the model is a base model, or
            it has no chat template that can be used.
    """
    from transformers import set_seed

    talk = Conversation.open(recipe.model, recipe.system, recipe.options())
    if recipe.seed is not None:
        set_seed(recipe.seed)
    print(HELP)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print(f"\n{HELP}")
            continue
        if line == "/exit":
            return
        if line == "/reset":
            talk.reset()
            print("(a new conversation)")
        elif line.startswith("/"):
            print(f"{line.split()[0]} is no command: {HELP}")
        elif line:
            with _until_interrupted(talk.stop):
                talk.say(line, lambda text: print(text, end="", flush=True))
            print()


class Conversation:
    """Messages so far, their tokens, and the cache that has seen these.

    Each turn the model reads only what is new. What it said is kept as the tokens it said it with, which need not be
    those that its text would be encoded to.
    """

    def __init__(self, model: Any, tokenizer: Any, system: str | None = None, options: dict[str, Any] | None = None):
        from ..data.rendering import require_chat

        self.model, self.tokenizer, self.system, self.options = model, tokenizer, system, options or {}
        self.renderer = require_chat(tokenizer, prompts=True)
        self._stopping = False
        self.reset()

    @classmethod
    def open(cls, folder: str, system: str | None = None, options: dict[str, Any] | None = None) -> Conversation:
        """A conversation with the model of a folder; see :func:`chat` for what is refused."""
        import torch

        from ..data.tokenizer import load_tokenizer
        from ..models import load_model

        model: Any = load_model(folder)
        tokenizer: Any = load_tokenizer(folder)
        record = Path(folder, artifacts.STAGE_FILE)
        stage = artifacts.read_json(record).get("stage") if record.is_file() else None
        if stage not in (None, *_TAUGHT):
            raise UserError(
                f"{folder} holds a base model (of `doge {stage}`), expected one of `doge sft` or `doge dpo`; "
                "`doge generate` continues text with it"
            )
        if len(tokenizer) > model.config.vocab_size:
            raise UserError(
                f"the tokenizer of {folder} has {len(tokenizer):,} entries and its model {model.config.vocab_size:,}"
            )
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        return cls(model, tokenizer, system, options)

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages: list[dict[str, str]] = []
        if self.system:
            self.messages.append({"role": "system", "content": self.system})
        self.ids: list[int] = []
        self.cache: Any = None

    def stop(self) -> None:
        """End the reply that is being made after its next token; may be called from a signal handler."""
        self._stopping = True

    def say(self, text: str, show: Callable[[str], Any] | None = None) -> str:
        """Answer a message of the user; returns the reply.

        Args:
            show: called with each piece of the reply as it comes, whole characters only.

        Raises:
            UserError: if the chat template refuses the messages.
        """
        import torch
        from transformers import StoppingCriteria, StoppingCriteriaList

        from ..models import DynamicMaskCache

        class Stopped(StoppingCriteria):
            def __call__(criterion, ids: Any, scores: Any, **kwargs: Any) -> Any:
                return torch.full((ids.shape[0],), self._stopping, dtype=torch.bool, device=ids.device)

        prompt = self._prompt(text)
        self._stopping = False
        if self.cache is None:
            self.cache = DynamicMaskCache(self.model.config)
        stream = CharacterStreamer(self.tokenizer, show or (lambda piece: None))
        inputs = torch.tensor([prompt], device=self.model.device)
        with torch.inference_mode():
            found = self.model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                past_key_values=self.cache,
                streamer=stream,
                stopping_criteria=StoppingCriteriaList([Stopped()]),
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=self.tokenizer.eos_token_id,
                **self.options,
            )
        self.ids = found[0].tolist()
        if self.ids[-1] != self.tokenizer.eos_token_id:  # stopped, or at its limit: the turn is over all the same
            self.ids.append(self.tokenizer.eos_token_id)
        reply = self.tokenizer.decode(self.ids[len(prompt) :], skip_special_tokens=True).strip()
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]
        return reply

    def _prompt(self, text: str) -> list[int]:
        """All tokens up to the reply: those the cache has seen, the end of the last reply, and the new message.

        Where the template does not put a message behind the ones before it, all is encoded anew, for a new cache.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        whole = self.renderer.prompts([asked])[0]
        if whole is None:
            raise UserError(f"the chat template of the model refuses {asked[-2:]}, expected it to take any text")
        if self.ids:
            (before,) = self.renderer.encode([self.messages])
            so_far = [] if before is None else before.input_ids
            if so_far and whole[: len(so_far)] == so_far:
                return self.ids + whole[len(so_far) :]
        self.cache = None
        return whole


class CharacterStreamer:
    """A streamer for ``generate`` that shows text as soon as its characters are whole.

    transformers' TextStreamer waits for a blank, so that text without blanks comes in one lump.
    """

    def __init__(self, tokenizer: Any, show: Callable[[str], Any]):
        self.tokenizer, self.show = tokenizer, show
        self._ids: list[int] = []
        self._shown = 0
        self._at_prompt = True

    def put(self, value: Any) -> None:
        """Take in the prompt, (1, T), which is not shown, or the next token, (1,)."""
        if self._at_prompt:
            self._at_prompt = False
            return
        self._ids += value.flatten().tolist()
        text = self.tokenizer.decode(self._ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # else some bytes of a character are still to come
            self._emit(text)

    def end(self) -> None:
        """Show what is left, broken characters too."""
        self._emit(self.tokenizer.decode(self._ids, skip_special_tokens=True))

    def _emit(self, text: str) -> None:
        if len(text) > self._shown:
            self.show(text[self._shown :])
            self._shown = len(text)


@contextlib.contextmanager
def _until_interrupted(stop: Callable[[], None]) -> Iterator[None]:
    """While this lasts, Ctrl-C calls ``stop``: an exception in the middle of a step would leave half a cache."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, lambda *_: stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
