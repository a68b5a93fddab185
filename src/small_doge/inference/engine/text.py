"""Text to tokens and back without transformers, whose import alone would take as long as a short reply."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import UserError

# Classes of transformers that take a tokenizer.json as it stands.
_PLAIN = ("TokenizersBackend", "PreTrainedTokenizerFast")


class Tokenizer:
    """The tokenizer of a model folder: prompts to ids, with the begin token if it adds one, and ids to text.

    Raises:
        UserError: if the folder holds no tokenizer, or one that cannot be read.
    """

    def __init__(self, folder: str | Path):
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"{folder} holds no tokenizer.json, expected a folder that `doge tokenizer` wrote")
        self._slow: Any = None
        if not _is_plain(Path(folder)):
            from ...data.tokenizer import load_tokenizer

            self._slow = load_tokenizer(folder)
            self.size = len(self._slow)
            return
        import tokenizers

        try:
            self._fast = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust side raises plain Exception
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"the tokenizer in {folder} cannot be read: {reason}") from error
        self._fast.no_padding()
        self._fast.no_truncation()
        self.size = self._fast.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt."""
        return self._slow(text)["input_ids"] if self._slow else self._fast.encode(text).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text without special tokens; bytes that are not UTF-8 become U+FFFD."""
        if self._slow:
            return self._slow.decode(list(ids), skip_special_tokens=True)
        return self._fast.decode(list(ids), skip_special_tokens=True)

    def stream(self) -> TextStream:
        """Text from ids that come one after another."""
        return TextStream(self)


class TextStream:
    """Gives text as soon as its characters are whole, however many tokens one takes."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        # Some tokens before the new ones are decoded too: how a token reads can depend on the one before it.
        self._ids: list[int] = []
        self._told = 0  # of these, tokens whose text was given

    def push(self, token: int) -> str:
        """The text that became whole by this token, perhaps none."""
        self._ids.append(token)
        text = self._new()
        if not text or text.endswith("\ufffd"):  # else some bytes of a character are still to come
            return ""
        del self._ids[: max(0, self._told - 1)]
        self._told = len(self._ids)
        return text

    def end(self) -> str:
        """What is left, broken characters too."""
        text = self._new()
        self._told = len(self._ids)
        return text

    def _new(self) -> str:
        before = self._tokenizer.decode(self._ids[: self._told])
        return self._tokenizer.decode(self._ids)[len(before) :]


def _is_plain(folder: Path) -> bool:
    """Whether tokenizer.json alone says how text is encoded and decoded."""
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True
    changed = any(config.get(name) for name in ("clean_up_tokenization_spaces", "add_eos_token", "auto_map"))
    return config.get("tokenizer_class", _PLAIN[0]) in _PLAIN and not changed
