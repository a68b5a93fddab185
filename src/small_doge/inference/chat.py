"""Talking with a model on the terminal: its chat template, and one state for all turns, the engine's or a cache."""

from __future__ import annotations

import contextlib
import functools
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import artifacts
from ..errors import UserError
from .generate import check_sampling, open_engine

if TYPE_CHECKING:
    from .engine import Engine, Session

HELP = (
    "/reset begins anew, /regenerate answers the last message again, /save FILE keeps the conversation, /exit leaves, "
    "Ctrl-C stops a reply"
)
# Stages whose models have been taught to answer. A folder of another stage holds a base model, whatever template its
# tokenizer carries; one without a record came from elsewhere, and its template is taken at its word.
_TAUGHT = ("sft", "dpo", "grpo")
_PIECE = 64  # tokens of a prompt that are read between two looks at whether to stop


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
    precision: str = field(
        default="auto", metadata={"help": "of weights on a CPU: float32, bf16, int8, int4, or auto, as they are stored"}
    )
    threads: int | None = field(default=None, metadata={"help": "on a CPU; null for one a core, 8 at most"})

    def __post_init__(self) -> None:
        check_sampling(self)

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
    talk = open_conversation(recipe)
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
        elif line == "/regenerate":
            if talk.can_regenerate:
                _reply(talk, talk.regenerate)
            else:
                print("there is no reply yet")
        elif line == "/save" or line.startswith("/save "):
            print(_save(talk, line.removeprefix("/save").strip()))
        elif line.startswith("/"):
            print(f"{line.split()[0]} is no command: {HELP}")
        elif line:
            _reply(talk, functools.partial(talk.say, line))


def _reply(talk: Conversation, say: Callable[[Callable[[str], Any]], Any]) -> None:
    """Show a reply as it comes, then how fast it came."""
    with _until_interrupted(talk.stop):
        say(lambda text: print(text, end="", flush=True))
    print(f"\n({talk.new_tokens} tokens, {talk.new_tokens / max(talk.seconds, 1e-9):.1f} tokens/s)")


def _save(talk: Conversation, name: str) -> str:
    """Write the messages as one row that `doge sft` reads; returns what to say about it."""
    if not name:
        return "/save wants the name of a file, as in /save talk.jsonl"
    path = Path(name).expanduser()
    if path.exists():
        return f"{name} is there already, expected another name"
    try:
        artifacts.write_text(path, json.dumps({"messages": talk.messages}, ensure_ascii=False) + "\n")
    except (OSError, ValueError) as error:
        return f"{name} cannot be written: {getattr(error, 'strerror', None) or error}"
    return f"(wrote {len(talk.messages)} messages to {name})"


def open_conversation(recipe: ChatRecipe) -> Conversation:
    """A conversation with a recipe's model: on the engine, or where that cannot run it on transformers, which is said.

    Raises:
        UserError: as :func:`chat`.
    """
    _check_stage(recipe.model)
    engine = open_engine(recipe.model, recipe.precision, recipe.threads)
    if engine is None:
        from transformers import set_seed

        if recipe.seed is not None:
            set_seed(recipe.seed)
        return Conversation.open(recipe.model, recipe.system, recipe.options())
    return EngineConversation.on(engine, recipe)


def untaught(folder: str) -> str | None:
    """The stage that wrote a model folder if it teaches no answers; None for one that does, or without a record."""
    record = Path(folder, artifacts.STAGE_FILE)
    written = artifacts.read_json(record) if record.is_file() else {}
    stage = written.get("of_stage") if written.get("stage") == "quantize" else written.get("stage")
    return None if stage in _TAUGHT else stage


def _check_stage(folder: str) -> None:
    if stage := untaught(folder):
        raise UserError(
            f"{folder} holds a base model (of `doge {stage}`), expected one of `doge sft` or `doge dpo`; "
            "`doge generate` continues text with it"
        )


def _check_vocabulary(folder: str, tokenizer: int, model: int) -> None:
    if tokenizer > model:
        raise UserError(f"the tokenizer of {folder} has {tokenizer:,} entries and its model {model:,}")


class Conversation:
    """Messages so far, their tokens, and the cache that has seen these.

    Each turn the model reads only what is new. What it said is kept as the tokens it said it with, which need not be
    those that its text would be encoded to.

    Attributes:
        new_tokens: of the last reply, one that ends it among these.
        seconds: that it took, reading the message included.
    """

    new_tokens = 0
    seconds = 0.0

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
        _check_stage(folder)
        _check_vocabulary(folder, len(tokenizer), model.config.vocab_size)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        return cls(model, tokenizer, system, options)

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages: list[dict[str, str]] = []
        if self.system:
            self.messages.append({"role": "system", "content": self.system})
        self.ids: list[int] = []
        self.cache: Any = None
        self._asked: list[int] = []  # all tokens up to the last reply

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
        reply = self._answer(self._prompt(text), show)
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]
        return reply

    @property
    def can_regenerate(self) -> bool:
        """Whether there is a reply."""
        return bool(self._asked)

    def regenerate(self, show: Callable[[str], Any] | None = None) -> str:
        """Answer the last message again, in place of the reply that is there; returns the new one.

        A state that dropped keys cannot be taken back: the conversation is read anew, the very tokens it had.
        """
        self.cache = None
        reply = self._answer(self._asked, show)
        self.messages[-1] = {"role": "assistant", "content": reply}
        return reply

    def _answer(self, prompt: list[int], show: Callable[[str], Any] | None) -> str:
        """The reply to all tokens so far, of which the cache has seen some."""
        self._stopping, self._asked = False, prompt
        start = time.perf_counter()
        new = self._generate(prompt, show or (lambda piece: None))
        self.new_tokens, self.seconds = len(new), time.perf_counter() - start
        self.ids = prompt + new
        if self.ids[-1] != self.tokenizer.eos_token_id:  # stopped, or at its limit: the turn is over all the same
            self.ids.append(self.tokenizer.eos_token_id)
        return self.tokenizer.decode(self.ids[len(prompt) :], skip_special_tokens=True).strip()

    def _generate(self, prompt: list[int], show: Callable[[str], Any]) -> list[int]:
        """The tokens of a reply, shown as they come."""
        import torch
        from transformers import StoppingCriteria, StoppingCriteriaList

        from ..models import DynamicMaskCache

        class Stopped(StoppingCriteria):
            def __call__(criterion, ids: Any, scores: Any, **kwargs: Any) -> Any:
                return torch.full((ids.shape[0],), self._stopping, dtype=torch.bool, device=ids.device)

        if self.cache is None:
            self.cache = DynamicMaskCache(self.model.config)
        stream = CharacterStreamer(self.tokenizer, show)
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
        return found[0, len(prompt) :].tolist()

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


class EngineConversation(Conversation):
    """A conversation on the engine, whose session is the cache."""

    engine: Engine
    cache: Session | None
    _text: Any  # the engine's tokenizer, whose stream is quicker
    seed: int | None = None
    turns = 0

    @classmethod
    def on(cls, engine: Engine, recipe: ChatRecipe) -> EngineConversation:
        """A conversation with the model of a recipe's folder, which ``engine`` runs."""
        from ..data.tokenizer import load_tokenizer
        from .engine.text import Tokenizer

        tokenizer: Any = load_tokenizer(recipe.model)
        _check_vocabulary(recipe.model, len(tokenizer), engine.shape.vocabulary)
        talk = cls(None, tokenizer, recipe.system, recipe.options())
        talk.engine, talk.seed, talk._text = engine, recipe.seed, Tokenizer(recipe.model)
        return talk

    def _generate(self, prompt: list[int], show: Callable[[str], Any]) -> list[int]:
        from .engine import GREEDY, Sampling

        if self.cache is None:
            self.cache = self.engine.session()
        while self.cache.seen < len(prompt) and not self._stopping:  # in pieces, so that Ctrl-C need not wait
            self.cache.feed(prompt[self.cache.seen : self.cache.seen + _PIECE])
        if self.cache.seen < len(prompt):
            return []
        names = ("temperature", "top_k", "top_p", "repetition_penalty")
        sampled = {name: self.options[name] for name in names if name in self.options}
        greedy = Sampling(GREEDY.temperature, repetition_penalty=sampled.get("repetition_penalty", 1.0))
        tokens, stream = [], self._text.stream()
        self.turns += 1
        for token in self.cache.generate(
            max_new_tokens=self.options["max_new_tokens"],
            sampling=Sampling(**sampled) if self.options["do_sample"] else greedy,
            seed=None if self.seed is None else self.seed + self.turns,  # else each reply would draw the same numbers
            stop={*self.engine.eos, self.tokenizer.eos_token_id},
            stopped=lambda: self._stopping,
        ):
            tokens.append(token)
            show(stream.push(token))
        show(stream.end())
        return tokens


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
        for token in value.flatten().tolist():
            self.push(token)

    def push(self, token: int) -> None:
        """Take in the next token."""
        self._ids.append(token)
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
