"""What answers look like, whole and as events of a stream, for conversations and for plain texts."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any


class Reply:
    """The answer to one request.

    Args:
        model: the name it was asked under.
        chat: a message of a conversation; otherwise text behind a prompt.
        prompt_tokens: of the prompt.
        with_usage: whether a stream ends with what was used.
        always: whether each event says what was used so far.
    """

    def __init__(self, model: str, chat: bool, prompt_tokens: int, with_usage: bool = False, always: bool = False):
        self.chat, self.prompt_tokens, self.with_usage, self.always = chat, prompt_tokens, with_usage, always
        self._head = {
            "id": ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex,
            "created": int(time.time()),
            "model": model,
        }

    def usage(self, completion_tokens: int, cached_tokens: int = 0) -> dict[str, Any]:
        """Tokens of the prompt and tokens made, the one that ends a text among these."""
        total = self.prompt_tokens + completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": total,
            "prompt_tokens_details": {"cached_tokens": cached_tokens},
        }

    def whole(self, text: str, reason: str, *tokens: int) -> dict[str, Any]:
        """The body of an answer that is not streamed; ``tokens`` are those of :meth:`usage`."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason, "logprobs": None}
        choice |= {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head, "object": kind, "choices": [choice], "usage": self.usage(*tokens)}

    def begin(self) -> str:
        """The first event: who speaks."""
        return self._event({"role": "assistant", "content": ""}) if self.chat else ""

    def piece(self, text: str, completion_tokens: int) -> str:
        """Text that came."""
        return self._event({"content": text}, text, completion_tokens=completion_tokens)

    def end(self, reason: str, *tokens: int) -> str:
        """The last events: why it ends, what was used if that was asked for, and that nothing follows."""
        last = self._event({}, "", reason, tokens[0])
        if self.with_usage:
            last += self._send({"choices": [], "usage": self.usage(*tokens)})
        return last + "data: [DONE]\n\n"

    def _event(
        self, delta: dict[str, str], text: str = "", reason: str | None = None, completion_tokens: int = 0
    ) -> str:
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason, "logprobs": None}
        choice |= {"delta": delta} if self.chat else {"text": text}
        used = {"usage": self.usage(completion_tokens) if self.always else None}
        return self._send({"choices": [choice], **(used if self.with_usage or self.always else {})})

    def _send(self, content: dict[str, Any]) -> str:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return event({**self._head, "object": kind, **content})


def event(content: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
