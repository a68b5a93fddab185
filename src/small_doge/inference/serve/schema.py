"""What requests may say: OpenAI's fields that this server grants, those that make no difference, those it refuses."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from .errors import invalid

# Fields that change nothing of the text here.
_IGNORED = frozenset(
    "user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention "
    "parallel_tool_calls".split()
)
# Fields that are refused unless they ask for what is done anyway.
_ONLY: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "verbosity": (),
    "suffix": ("",),
    "echo": (False,),
}


def _whole(text: str) -> str:
    """The text, unless it holds half of a surrogate pair, as JSON can spell it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("unicode", "this is not Unicode text") from None
    return text


Words = Annotated[str, AfterValidator(_whole)]
Stop = Annotated[Words, Field(min_length=1, max_length=256)]
Token = Annotated[int, Field(ge=0, lt=1 << 31)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class StreamOptions(_Strict):
    """What a stream says of the tokens used: at its end, and with every event (which is vLLM's field)."""

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False
    include_obfuscation: bool | None = False


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: Words


class Message(_Strict):
    """What someone said."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Words | Annotated[list[TextPart], Field(min_length=1, max_length=256)]

    def plain(self) -> dict[str, str]:
        """Role and text as the chat template takes them."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class _Request(_Strict):
    model: Words
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0, le=1 << 31)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None

    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def most(self) -> tuple[str, int | None]:
        """The field that says how many new tokens are wanted, and its value."""
        return "max_tokens", self.max_tokens

    def check_extras(self) -> None:
        """Raise ApiError for a field that asks for something this server does not do."""
        for name, value in (self.model_extra or {}).items():
            if name in _IGNORED:
                continue
            shown = name if len(name) <= 64 and name.isidentifier() else "a field of the request"
            if name not in _ONLY:
                raise invalid(f"{shown} is no field of this request", shown, "unknown_parameter")
            if value is not None and not any(type(value) is type(only) and value == only for only in _ONLY[name]):
                allowed = " or ".join(repr(only) for only in (*_ONLY[name][:1], None))
                raise invalid(
                    f"`{name}` is not something this server does, expected {allowed}", name, "unsupported_parameter"
                )
        if self.stream_options is not None and not self.stream:
            raise invalid("`stream_options` are for `stream: true` only", "stream_options")


class ChatRequest(_Request):
    """A conversation to answer."""

    messages: list[Message] = Field(min_length=1, max_length=1024)
    max_completion_tokens: int | None = Field(None, ge=1)

    def most(self) -> tuple[str, int | None]:
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return super().most()


class CompletionRequest(_Request):
    """A text to continue; as ids it is taken as it is, and as a list it may hold one."""

    prompt: Words | list[Words] | list[Token] | list[list[Token]]

    def one(self) -> str | list[int]:
        """The one prompt.

        Raises:
            ApiError: for several, or none.
        """
        prompt: Any = self.prompt
        if isinstance(prompt, list) and (not prompt or not isinstance(prompt[0], int)):
            if len(prompt) != 1:
                raise invalid(f"`prompt` holds {len(prompt)} texts, expected one", "prompt", "unsupported_parameter")
            prompt = prompt[0]
        return prompt
