"""A byte-level BPE tokenizer, trained on the train side of a corpus and saved as transformers loads it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from .. import artifacts
from ..errors import UserError
from ..recipe import plain
from .corpora import open_corpus, split_of, unique

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"
_NAMED = (BOS, EOS, PAD, "<|start_header_id|>", "<|end_header_id|>")
SPECIAL_TOKENS: tuple[str, ...] = _NAMED + tuple(f"<|reserved_special_token_{i}|>" for i in range(16 - len(_NAMED)))
"""The special tokens; a token's id is its place."""

# Contents are trimmed, as in Llama 3: blank lines at the front of one would merge with the header's into one token,
# which then stands on both sides of the mask and is not what a prompt for generation ends in.
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}
            {{- message['content'] | trim + eos_token }}
        {%- endgeneration %}
    {%- else %}
        {{- message['content'] | trim + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

# Pieces that no merge crosses, as in Llama 3: English contractions, words with one leading character, digits in groups
# of up to three, punctuation with the line ends that follow, line ends, other blanks.
_PIECES = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
_SMALLEST = 256 + len(SPECIAL_TOKENS)
_SAMPLE_BYTES = 1 << 20
_STAGE = "tokenizer"


@dataclass
class TokenizerRecipe:
    """Settings of `doge tokenizer`."""

    output_dir: str = field(metadata={"help": "folder to write the tokenizer to"})
    corpus: Any = field(
        default="stdlib", metadata={"help": "text to learn from: `stdlib`, a path, a mapping or a list of these"}
    )
    vocab_size: int = field(
        default=32768, metadata={"help": f"entries in all, at least {_SMALLEST}: 256 bytes and the special tokens"}
    )
    validation_fraction: float = field(
        default=0.01, metadata={"help": "share of documents kept out of training; the same as in `doge prepare`"}
    )
    max_bytes: int | None = field(
        default=None, metadata={"help": "stop after this many bytes of text; null for the whole corpus"}
    )
    min_frequency: int = field(
        default=2, metadata={"help": "how often two tokens must stand side by side to be merged into one"}
    )


def train_tokenizer(recipe: TokenizerRecipe) -> Path:
    """Train a tokenizer and save it in ``recipe.output_dir``; returns that folder.

    A folder that already holds this tokenizer is left as it is. ``stage.json`` records the documents and bytes trained
    on, and UTF-8 bytes per token on up to 1 MiB of validation text (null if there is none).

    Raises:
        UserError: for settings out of range, a corpus that cannot be read or is too small to fill the vocabulary, and
            an output folder that holds something else.
    """
    _check(recipe)
    folder = Path(recipe.output_dir)
    settings = {name: value for name, value in plain(recipe).items() if name != "output_dir"}
    if artifacts.is_finished(folder, _STAGE, settings):
        print(f"tokenizer {folder} is already there")
        return folder
    corpus = open_corpus(recipe.corpus)
    print(f"training a tokenizer of {recipe.vocab_size:,} entries into {folder}")
    start = time.perf_counter()
    with artifacts.staged(folder) as partial:
        texts = _TrainSide(unique(corpus), recipe.validation_fraction, recipe.max_bytes)
        backend = _train(texts, recipe.vocab_size, recipe.min_frequency)
        if not texts.count:
            raise UserError(f"the corpus {corpus.name} holds no text to learn from")
        reached = backend.get_vocab_size()
        if reached < recipe.vocab_size:
            raise UserError(
                f"the corpus {corpus.name} ({texts.count:,} documents, {texts.bytes:,} bytes) is too small for "
                f"vocab_size {recipe.vocab_size:,}: it reached {reached:,} entries with min_frequency "
                f"{recipe.min_frequency}"
            )
        tokenizer = _wrap(backend)
        tokenizer.save_pretrained(partial)
        facts: dict[str, Any] = {"documents": texts.count, "bytes": texts.bytes, "bytes_per_token": None}
        if texts.validation:
            tokens = sum(map(len, encode_text(tokenizer, texts.validation)))
            facts["bytes_per_token"] = round(texts.validation_bytes / tokens, 4)
        seconds = time.perf_counter() - start
        artifacts.finish(partial, _STAGE, settings, seconds, **facts)
    per_token = facts["bytes_per_token"]
    measured = "no validation text" if per_token is None else f"{per_token} bytes per token on validation text"
    size = f"{texts.count:,} documents, {texts.bytes / 1e6:,.1f} MB"
    print(f"wrote tokenizer {folder} in {seconds:.1f} s: {size}, {measured}")
    return folder


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a folder: one that `train_tokenizer` wrote, or any other with a ``tokenizer.json``.

    Raises:
        UserError: if the folder holds no tokenizer, or one that cannot be read.
    """
    tokenizer_file(folder)
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the Rust side raises plain Exception
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"the tokenizer in {folder} cannot be read: {reason}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"the tokenizer in {folder} is a {type(tokenizer).__name__}, expected a fast tokenizer")
    return tokenizer


def tokenizer_file(folder: str | Path) -> Path:
    """The ``tokenizer.json`` in ``folder``; UserError if there is none."""
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no tokenizer.json, expected a folder that `doge tokenizer` wrote")
    return path


def encode_text(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text as plain text: no begin or end token is added.

    The letters of a special token inside a text are letters and do not become that token, so that a text can neither
    end itself nor be lost: `decode_text` gives back the very string. The batch is encoded by several threads.
    """
    return [
        encoding.ids for encoding in plain_tokenizer(tokenizer).encode_batch_fast(list(texts), add_special_tokens=False)
    ]


def decode_text(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    """The text of token ids without begin, end and pad tokens; bytes that are not UTF-8 become U+FFFD."""
    skipped = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    return plain_tokenizer(tokenizer).decode([i for i in map(int, ids) if i not in skipped], skip_special_tokens=False)


def decode_bytes(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> bytes:
    """The UTF-8 bytes of token ids without begin, end and pad tokens, exact even where a token splits a character.

    Raises:
        UserError: if the tokenizer is not a byte-level one.
    """
    letters, added = _letters(), tokenizer.added_tokens_decoder
    skipped = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    pieces = []
    for i in map(int, ids):
        if i in skipped:
            continue
        token = str(tokenizer.convert_ids_to_tokens(i))
        try:
            pieces.append(token.encode() if i in added else bytes(letters[letter] for letter in token))
        except KeyError:
            raise UserError(f"token {i} is {token!r}, expected a token of a byte-level tokenizer") from None
    return b"".join(pieces)


def _check(recipe: TokenizerRecipe) -> None:
    if recipe.vocab_size < _SMALLEST:
        raise UserError(
            f"vocab_size is {recipe.vocab_size}, expected at least {_SMALLEST}: "
            f"256 bytes and {len(SPECIAL_TOKENS)} special tokens"
        )
    if not 0 <= recipe.validation_fraction < 1:
        raise UserError(f"validation_fraction is {recipe.validation_fraction}, expected from 0 to below 1")
    if recipe.max_bytes is not None and recipe.max_bytes < 1:
        raise UserError(f"max_bytes is {recipe.max_bytes}, expected a whole number above 0 or null")
    if recipe.min_frequency < 1:
        raise UserError(f"min_frequency is {recipe.min_frequency}, expected a whole number above 0")


class _TrainSide:
    """The texts of the train side, counted as they pass, and a sample of the other side."""

    def __init__(self, documents: unique, validation_fraction: float, max_bytes: int | None) -> None:
        self.documents, self.fraction, self.max_bytes = documents, validation_fraction, max_bytes
        self.count = self.bytes = self.validation_bytes = 0
        self.validation: list[str] = []

    def __iter__(self) -> Iterator[str]:
        for document in self.documents:
            size = len(document.text.encode())
            if split_of(document, self.fraction) == "validation":
                if self.validation_bytes < _SAMPLE_BYTES:
                    self.validation_bytes += size
                    self.validation.append(document.text)
                continue
            self.count += 1
            self.bytes += size
            yield document.text
            if self.max_bytes is not None and self.bytes >= self.max_bytes:
                return


def _train(texts: _TrainSide, vocab_size: int, min_frequency: int) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        iter(texts),
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=min_frequency,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=sys.stderr.isatty(),
        ),
    )
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, SPECIAL_TOKENS.index(BOS))]
    )
    return backend


def _wrap(backend: Tokenizer) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


_plain_copies: WeakKeyDictionary[Any, Tokenizer] = WeakKeyDictionary()


def plain_tokenizer(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy of the Rust tokenizer that knows no special tokens in text and neither pads nor cuts."""
    copy = _plain_copies.get(tokenizer)
    if copy is None or copy.get_vocab_size() != len(tokenizer):
        from tokenizers import Tokenizer

        copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        copy.encode_special_tokens = True
        copy.no_padding()
        copy.no_truncation()
        _plain_copies[tokenizer] = copy
    return copy


@lru_cache(maxsize=1)
def _letters() -> dict[str, int]:
    """The byte that each letter of a byte-level token stands for (GPT-2's table).

    Printable Latin-1 characters stand for themselves; the other bytes, in order, have the letters from U+0100 on.
    """
    themselves = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(themselves))
    return {chr(byte): byte for byte in themselves} | {chr(256 + i): byte for i, byte in enumerate(others)}
