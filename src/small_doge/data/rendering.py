"""Messages as token ids: what the chat template writes becomes tokens, what people wrote stays letters.

transformers' own `apply_chat_template` turns the letters of a special token inside a message into that token, so that
a message can end itself and forge the next speaker's; its `sanitize_control_tokens` (from 5.23) prevents that but
refuses to give the assistant's mask at the same time. Here the rendered text is taken apart before it is encoded.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .. import artifacts
from ..errors import UserError
from . import tokenizer as plain_text
from .messages import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Private characters that stand for the letters of special tokens while the template is rendered.
_STAND_INS = range(0xF0000, 0xFFFFE)
_PROBE: list[Message] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is two and two?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "Are you sure?"},
    {"role": "assistant", "content": "Yes, I am."},
]


@dataclass(frozen=True)
class Chat:
    """A conversation in tokens: ``input_ids`` and, for each, 1 in ``mask`` where it carries loss; ``ends`` are the
    places right after each of the assistant's turns."""

    input_ids: list[int]
    mask: list[int]
    ends: list[int]


class Renderer:
    """The chat template of a tokenizer.

    The text is cut at the special tokens that the template wrote and at both ends of an assistant's turn, as the
    ``{% generation %}`` marks have it, and the pieces between are encoded as plain text. A turn therefore has the very
    tokens that a model writes behind the prompt for it, whatever merges the tokenizer has. As in `encode_text`, added
    tokens that are not special ones stay tokens in any text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        special = {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special = special
        longest_first = sorted(filter(None, special), key=len, reverse=True)
        self.pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")" if longest_first else "(?!)")

    def encode(self, conversations: Sequence[list[Message]]) -> list[Chat | None]:
        """Each conversation in tokens; None for one that the template refuses."""
        return self._encode([self._pieces(messages) for messages in conversations])

    def sizes(self, conversations: Sequence[list[Message]]) -> list[int]:
        """UTF-8 bytes of the text that the tokens of each conversation hold: without begin, end and pad tokens."""
        silent = {self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id}
        return [
            sum(len(text.encode()) for text, token, _ in self._pieces(messages) or () if token not in silent)
            for messages in conversations
        ]

    def texts(self, texts: Sequence[str]) -> list[Chat]:
        """Plain texts in tokens: begin token without loss, text and end token with; no template."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        begin, end = ([] if token is None else [token] for token in (bos, eos))
        chats = []
        for ids in plain_text.encode_text(self.tokenizer, texts):
            mask = [0] * len(begin) + [1] * (len(ids) + len(end))
            chats.append(Chat([*begin, *ids, *end], mask, [len(mask)]))
        return chats

    def prompts(self, conversations: Sequence[list[Message]]) -> list[list[int] | None]:
        """Token ids of each conversation with the generation prompt at its end, as at inference."""
        chats = self._encode([self._pieces(messages, prompt=True) for messages in conversations])
        return [None if chat is None else chat.input_ids for chat in chats]

    def replies(self, conversations: Sequence[list[Message]]) -> list[list[int] | None]:
        """Token ids of the last assistant's turn of each conversation with its end token, and nothing else."""
        pieces = [self._pieces(messages) for messages in conversations]
        chats = self._encode([None if some is None else _last_turn(some) for some in pieces])
        return [None if chat is None else chat.input_ids for chat in chats]

    def render(self, messages: list[Message], prompt: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """The text of the template, and where each of the assistant's turns begins and ends in it."""
        from transformers.utils.chat_template_utils import render_jinja_template

        named: dict[str, Any] = dict(self.tokenizer.special_tokens_map)
        rendered: Any = render_jinja_template(
            conversations=[messages],
            chat_template=self.tokenizer.get_chat_template(),
            return_assistant_tokens_mask=True,
            add_generation_prompt=prompt,
            **named,
        )
        (text,), (turns,) = rendered
        return text, turns

    def _pieces(self, messages: list[Message], prompt: bool = False) -> list[tuple[str, int | None, int]] | None:
        """Parts of the rendered text: (text, None, turn) or (token, its id, turn), ``turn`` from 1 or 0 outside."""
        from jinja2 import TemplateError

        letters: dict[str, str] = {}
        if any(self.pattern.search(message["content"]) for message in messages):
            letters = self._stand_ins("".join(message["content"] for message in messages))
            hidden = {token: char for char, token in letters.items()}
            messages = [
                {**message, "content": self.pattern.sub(lambda found: hidden[found[0]], message["content"])}
                for message in messages
            ]
        try:
            text, turns = self.render(messages, prompt)
        except TemplateError:
            return None
        pieces: list[tuple[str, int | None, int]] = []
        position = 0
        for number, (start, end) in enumerate([*turns, (len(text), len(text))], start=1):
            for part, turn in ((text[position:start], 0), (text[start:end], number)):
                for piece in self.pattern.split(part):
                    if piece in self.special:
                        pieces.append((piece, self.special[piece], turn))
                    elif piece:
                        shown = "".join(letters.get(char, char) for char in piece) if letters else piece
                        pieces.append((shown, None, turn))
            position = end
        return pieces

    def _stand_ins(self, text: str) -> dict[str, str]:
        """A character that is not in ``text`` for each special token whose letters are."""
        unused = (char for char in map(chr, _STAND_INS) if char not in text)
        return {next(unused): token for token in dict.fromkeys(self.pattern.findall(text))}

    def _encode(self, conversations: Sequence[list[tuple[str, int | None, int]] | None]) -> list[Chat | None]:
        texts = [text for pieces in conversations for text, token, _ in pieces or () if token is None]
        encoded = iter(plain_text.encode_text(self.tokenizer, texts))
        chats: list[Chat | None] = []
        for pieces in conversations:
            if pieces is None:
                chats.append(None)
                continue
            ids: list[int] = []
            mask: list[int] = []
            ends: dict[int, int] = {}
            for _, token, turn in pieces:
                new = next(encoded) if token is None else [token]
                ids += new
                mask += [1 if turn else 0] * len(new)
                if turn:
                    ends[turn] = len(ids)
            chats.append(Chat(ids, mask, list(ends.values())))
        return chats


def _last_turn(pieces: list[tuple[str, int | None, int]]) -> list[tuple[str, int | None, int]]:
    last = max(turn for _, _, turn in pieces)
    return [piece for piece in pieces if piece[2] == last]


def code_version(*files: str) -> str:
    """A digest of the code that encodes, so that what datasets has kept from another version is not taken for it."""
    return artifacts.sha256(*files, __file__, str(plain_text.__file__))


def require_chat(tokenizer: PreTrainedTokenizerFast, prompts: bool = False) -> Renderer:
    """The renderer of a tokenizer, once a conversation made for the purpose came through it as it should.

    With ``prompts`` it is also checked that a prompt for generation is what stands before the reply in the whole
    conversation: only then are the two parts of a preference the whole.

    Raises:
        UserError: for a tokenizer without a chat template, a template without ``{% generation %}`` marks or with marks
            that leave out the end of a turn, one that writes tokens the tokenizer does not have, and one whose text
            the tokenizer reads otherwise than piece by piece.
    """
    name = f"the tokenizer {tokenizer.name_or_path}" if tokenizer.name_or_path else "the tokenizer"
    try:
        template = tokenizer.get_chat_template()
    except ValueError:
        raise UserError(
            f"{name} has no chat template, expected one with {{% generation %}} marks, as `doge tokenizer` writes it"
        ) from None
    if not re.search(r"\{%-?\s*generation\s*-?%\}", template):
        raise UserError(
            f"the chat template of {name} has no {{% generation %}} marks, expected them around the assistant's turns"
        )
    renderer = Renderer(tokenizer)
    probe, text, turns = _probe(renderer, name)
    unknown = [found for found in re.findall(r"<\|[^\s|<>]+\|>", text) if found not in tokenizer.get_added_vocab()]
    if unknown:
        raise UserError(
            f"the chat template of {name} writes {unknown[0]}, which is no token of its vocabulary, expected a "
            "tokenizer with chat tokens"
        )
    answers = [message["content"] for message in probe if message["role"] == "assistant"]
    marked = [text[start:end] for start, end in turns]
    if len(marked) != len(answers) or any(a not in m for a, m in zip(answers, marked, strict=True)):
        raise UserError(
            f"the {{% generation %}} marks of the chat template of {name} hold {marked}, expected {answers}, each with "
            "its end token"
        )
    if any(not renderer.pattern.search(m.split(a, 1)[1]) for a, m in zip(answers, marked, strict=True)):
        raise UserError(
            f"the {{% generation %}} marks of the chat template of {name} hold {marked[0]!r}, expected an end token "
            "behind the answer: without it a model never learns to stop"
        )
    (chat,) = renderer.encode([probe])
    whole: Any = tokenizer.apply_chat_template(probe, return_dict=True)
    if chat is None or chat.input_ids != whole["input_ids"]:
        raise UserError(
            f"{name} encodes a conversation in one piece otherwise than in its parts, expected a byte-level tokenizer"
        )
    if prompts and renderer.render(probe[:-1], prompt=True)[0] != text[: turns[-1][0]]:
        raise UserError(
            f"the chat template of {name} ends a prompt for generation in "
            f"{renderer.render(probe[:-1], prompt=True)[0][-40:]!r}, expected what stands before a reply: "
            f"{text[: turns[-1][0]][-40:]!r}"
        )
    return renderer


def _probe(renderer: Renderer, name: str) -> tuple[list[Message], str, list[tuple[int, int]]]:
    """The probe with its system message, or without where the template refuses that."""
    from jinja2 import TemplateError

    reason: Any = None
    for probe in (_PROBE, _PROBE[1:]):
        try:
            return probe, *renderer.render(probe)
        except TemplateError as error:
            reason = error
    raise UserError(f"the chat template of {name} refuses a plain conversation: {reason}") from None
