"""The recipe of `doge serve`: what is served, where, to whom, and how much of it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import UserError

KEY_VARIABLE = "DOGE_API_KEY"
_AT_LEAST_ONE = "max_active max_prompt_tokens max_new_tokens max_body_bytes max_connections tokens_a_turn".split()
_MORE_THAN_ZERO = ("max_seconds", "body_seconds")


@dataclass
class ServeRecipe:
    """A model folder, an address, and bounds; sampling fields are for requests that do not say their own."""

    model: str = field(metadata={"help": "model folder, or one that `doge quantize` wrote"})
    host: str = field(default="127.0.0.1", metadata={"help": "address to listen at; 0.0.0.0 for every machine"})
    port: int = field(default=8000, metadata={"help": "to listen at; 0 for any that is free"})
    api_key: str | None = field(
        default=None, metadata={"help": f"what /v1 asks of a client; env takes it from {KEY_VARIABLE}; null for none"}
    )
    name: str | None = field(default=None, metadata={"help": "of the model in the API; null for the folder's"})
    hosts: list = field(
        default_factory=list, metadata={"help": "names this server may be called by besides its address and localhost"}
    )
    precision: str = field(
        default="auto", metadata={"help": "of weights on a CPU: float32, bf16, int8, int4, or auto, as they are stored"}
    )
    threads: int | None = field(default=None, metadata={"help": "on a CPU; null for one a core, 8 at most"})
    temperature: float = field(default=0.7, metadata={"help": "below 1 sharper, above 1 flatter, 0 the likeliest"})
    top_p: float = field(default=0.9, metadata={"help": "sample from the likeliest tokens that make up this mass"})
    max_active: int = field(default=4, metadata={"help": "requests that are answered at once, in turn"})
    max_waiting: int = field(default=28, metadata={"help": "requests that may wait for that; others are answered 503"})
    tokens_a_turn: int = field(default=4, metadata={"help": "tokens of one request before it is the next one's turn"})
    kept_texts: int = field(
        default=2, metadata={"help": "texts that are kept, so that a request that continues one reads only what is new"}
    )
    max_prompt_tokens: int = field(default=8192, metadata={"help": "tokens of a prompt at most"})
    max_new_tokens: int = field(default=1024, metadata={"help": "tokens of an answer at most, and where none are said"})
    max_seconds: float = field(default=300.0, metadata={"help": "of a request, waiting included, at most"})
    max_body_bytes: int = field(default=1 << 20, metadata={"help": "of a request at most"})
    body_seconds: float = field(
        default=20.0, metadata={"help": "in which the head of a request has to arrive, and its body"}
    )
    max_connections: int = field(default=256, metadata={"help": "open at once; others are answered 503"})

    def __post_init__(self) -> None:
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}, expected at least 1")
        for name in _MORE_THAN_ZERO:
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"`{name}` is {getattr(self, name)}, expected more than 0")
        for name in ("max_waiting", "kept_texts"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` is {getattr(self, name)}, expected 0 or more")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"`port` is {self.port}, expected 0 to 65535")
        if not 0 <= self.temperature <= 2:
            raise ValueError(f"`temperature` is {self.temperature}, expected 0 to 2")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` is {self.top_p}, expected more than 0 and at most 1")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"`threads` is {self.threads}, expected at least 1")
        if self.api_key is not None and not self.api_key.strip():
            raise ValueError("`api_key` is empty, expected a key, env or null")

    @property
    def served_name(self) -> str:
        """What clients call the model."""
        return self.name or Path(self.model).resolve().name or "doge"

    def key(self) -> str | None:
        """The key that clients have to bring, or None.

        Raises:
            UserError: if it is to come from the environment and is not there, or is none that a header can carry.
        """
        key = self.api_key
        if key == "env":
            key = os.environ.get(KEY_VARIABLE, "").strip()
            if not key:
                raise UserError(f"api_key is env and {KEY_VARIABLE} is not set, expected the key in it")
        if key is not None and not (key.isascii() and key.isprintable() and key == key.strip()):
            raise UserError("the API key holds something else, expected printable ASCII without blanks at its ends")
        return key
