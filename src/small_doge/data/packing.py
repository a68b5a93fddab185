"""`doge prepare`: a corpus as rows of one length on disk, in shards; `packed` reads them back.

All documents of a split stand one behind the other, each as begin token, text, end token. A shard ends with the
document that fills it, and is cut into rows of ``row_length`` tokens wherever the cut falls; nothing is lost but the
padding at the end of its last row.

    manifest.json                    what is here, with counts and checksums of every shard
    {split}-00000.tokens.bin         (rows · row_length,) little-endian uint16, or uint32 above 65,536 entries
    {split}-00000.documents.bin      (documents + 1,) little-endian int64: where each starts, and the end of the last
    unfinished/                      while a run is under way: what continuing it needs
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import artifacts
from ..errors import UserError
from ..recipe import plain
from .corpora import Corpus, open_corpus
from .encoding import BLANK, Pool, Work, cores
from .filters import check_filters
from .mixing import Mix
from .packed import FORMAT, IGNORED, PackedTokens, collate, fingerprint, read_manifest, require_vocabulary
from .shards import SPLITS, UNFINISHED, Part, Run
from .tokenizer import load_tokenizer, tokenizer_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["FORMAT", "IGNORED", "SPLITS", "PackedTokens", "PrepareRecipe", "collate", "prepare", "require_vocabulary"]

_STAGE = "prepare"
_DUPLICATE = "duplicate"
# What does not change what comes out: where things lie, and how the work is cut up.
_INDIFFERENT = ("output_dir", "tokenizer", "batch_documents", "workers", "verify")


@dataclass
class PrepareRecipe:
    """Settings of `doge prepare`."""

    tokenizer: str = field(metadata={"help": "folder of the tokenizer"})
    output_dir: str = field(metadata={"help": "folder to write the packed tokens to"})
    corpus: Any = field(default="stdlib", metadata={"help": "`stdlib`, a path, a mapping or a list of these"})
    row_length: int = field(default=2048, metadata={"help": "tokens in a row, at least 8"})
    validation_fraction: float = field(
        default=0.01, metadata={"help": "share of documents kept for validation, picked by a hash of their text"}
    )
    mix_by: str = field(default="tokens", metadata={"help": "what weights of a corpus count: `tokens` or `bytes`"})
    max_tokens: int | None = field(
        default=None, metadata={"help": "stop at this many tokens for training; null for the whole corpus"}
    )
    filters: Any = field(
        default=None,
        metadata={
            "help": "texts to leave out: a mapping of min_characters, max_characters, max_repeated_lines, "
            "gopher_repetition, gopher_quality"
        },
    )
    shard_tokens: int = field(default=1 << 26, metadata={"help": "tokens of a shard, after which a run can continue"})
    batch_documents: int = field(default=512, metadata={"help": "documents that are encoded at a time"})
    workers: int | None = field(
        default=None, metadata={"help": "processes that encode a corpus above 64 MB; null for one a core, 1 for none"}
    )
    verify: bool = field(default=False, metadata={"help": "check the hashes of a finished output_dir, write nothing"})


def prepare(recipe: PrepareRecipe) -> Path:
    """Encode and pack a corpus into ``recipe.output_dir``; returns that folder.

    A folder that already holds this run is left as it is. One that was begun is continued behind its last finished
    shard, and holds the same bytes in the end, whatever ``workers`` is. Memory is bounded by the batches under way (4
    MB of text, ``workers`` + 2 of each source) and the digest by which each duplicate is found (16 bytes, some 100 in
    a Python set, so 100 MB a million documents).

    Raises:
        UserError: for settings out of range, a corpus or tokenizer that cannot be read, a split that gets no document,
            a full disk, and an output folder that holds something else. Finished shards stay, and nothing else.
    """
    filters = _check(recipe)
    folder = Path(recipe.output_dir)
    if recipe.verify:
        _verify(folder)
        return folder
    settings = {name: value for name, value in plain(recipe).items() if name not in _INDIFFERENT}
    settings |= {"filters": filters, "tokenizer_sha256": artifacts.sha256(tokenizer_file(recipe.tokenizer))}
    if (folder / artifacts.STAGE_FILE).exists() and (folder / "manifest.json").exists():
        read_manifest(folder)  # an older format says so, rather than in which setting it differs
        if artifacts.is_finished(folder, _STAGE, settings):
            shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
            print(f"packed tokens {folder} are already there")
            return folder
    tokenizer = load_tokenizer(recipe.tokenizer)
    for name in ("bos_token", "eos_token"):
        if getattr(tokenizer, name) is None:
            raise UserError(f"the tokenizer in {recipe.tokenizer} has no {name}, expected one to mark documents with")
    corpus = open_corpus(recipe.corpus)
    facts = [part.facts for part in corpus.parts or (corpus,)]
    run = Run(folder, settings, hashlib.sha256(json.dumps(facts).encode()).hexdigest())
    again = f", continuing behind part {len(run.records)}" if run.records else ""
    print(f"packing {corpus.name} into {folder}{again}", flush=True)
    start = time.perf_counter()
    packer = _Packer(run, corpus, tokenizer, recipe, filters)
    if recipe.max_tokens is not None:
        left = max(0, recipe.max_tokens - packer.tokens["train"])
        artifacts.require_space(folder, packer.dtype.itemsize * left, "what is still to be packed")
    try:
        run.begin()
        found = packer.pack()
        manifest = {
            "format": FORMAT,
            "row_length": recipe.row_length,
            "dtype": _dtype(tokenizer),
            "vocab_size": len(tokenizer),
            "tokenizer_sha256": settings["tokenizer_sha256"],
            "tokenizer_fingerprint": fingerprint(recipe.tokenizer),
            **{name: settings[name] for name in ("corpus", "validation_fraction", "mix_by", "max_tokens", "filters")},
            **found,
        }
        artifacts.write_json(folder / "manifest.json", manifest)
        seconds = time.perf_counter() - start
        splits = {name: {k: v for k, v in split.items() if k != "shards"} for name, split in manifest["splits"].items()}
        artifacts.finish(folder, _STAGE, settings, seconds, splits=splits)
    except BaseException as error:
        run.abandon()
        full = run.full(error) if isinstance(error, OSError) else None
        if full is not None:
            raise full from error
        raise
    run.close()
    counts = ", ".join(f"{s['tokens']:,} {name} tokens ({s['rows']:,} rows)" for name, s in manifest["splits"].items())
    print(f"wrote packed tokens {folder} in {seconds:.1f} s: {counts}")
    return folder


def _check(recipe: PrepareRecipe) -> dict[str, Any]:
    """The filters, once every setting is seen to be in range."""
    if recipe.row_length < 8:
        raise UserError(f"row_length is {recipe.row_length}, expected at least 8")
    if not 0 < recipe.validation_fraction < 1:
        raise UserError(f"validation_fraction is {recipe.validation_fraction}, expected a number between 0 and 1")
    if recipe.mix_by not in ("tokens", "bytes"):
        raise UserError(f"mix_by is {recipe.mix_by!r}, expected tokens or bytes")
    for name in ("batch_documents", "shard_tokens", "max_tokens", "workers"):
        value = getattr(recipe, name)
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}, expected a whole number above 0")
    return check_filters(recipe.filters)


def _verify(folder: Path) -> None:
    start = time.perf_counter()
    manifest = read_manifest(folder)
    for split in manifest["splits"]:
        PackedTokens(folder, split, check=False).verify()
    shards = sum(len(split["shards"]) for split in manifest["splits"].values())
    print(f"packed tokens {folder} are whole: {shards} shards in {time.perf_counter() - start:.1f} s")


def _dtype(tokenizer: PreTrainedTokenizerFast) -> str:
    return "uint16" if len(tokenizer) <= 1 << 16 else "uint32"


class _Packer:
    """One run from where it stands to its end."""

    def __init__(
        self,
        run: Run,
        corpus: Corpus,
        tokenizer: PreTrainedTokenizerFast,
        recipe: PrepareRecipe,
        filters: dict[str, Any],
    ) -> None:
        self.run, self.corpus, self.tokenizer, self.recipe = run, corpus, tokenizer, recipe
        self.dtype = np.dtype(_dtype(tokenizer)).newbyteorder("<")
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos
        self.work = Work(recipe.tokenizer, bos, eos, self.dtype.str, recipe.validation_fraction, filters)
        state = run.records[-1]["state"] if run.records else {"sources": {}, "dropped": {}, "given": []}
        self.sources: dict[str, dict[str, int]] = state["sources"]
        self.dropped = Counter[str](state["dropped"])
        self.given: list[int] = state["given"]
        self.tokens = Counter[str]()  # of each split
        self.documents = 0
        for record in run.records:
            for shard in record["shards"]:
                self.tokens[shard["split"]] += shard["tokens"]
                self.documents += shard["documents"]

    def pack(self) -> dict[str, Any]:
        """Write every part that is missing; returns what the manifest says of them."""
        recipe, positions = self.recipe, self.run.records[-1]["state"]["positions"] if self.run.records else None
        with Pool(self.work, self.tokenizer, recipe.workers or cores()) as pool:
            mix = Mix(self.corpus, pool, recipe.batch_documents, positions, self.given)
            seen, progress = self.run.digests(), _Progress(self, mix)
            part = self._part()
            try:
                documents = iter(mix)
                while not self._enough() and (drawn := next(documents, None)) is not None:
                    k, batch, i = drawn
                    if (reason := batch.dropped[i]) is None and batch.digests[i] in seen:
                        reason = _DUPLICATE
                    if reason is not None:
                        self.dropped[reason] += 1
                        continue
                    ids, size = batch.ids[batch.ends[i - 1] if i else 0 : batch.ends[i]], batch.sizes[i]
                    mix.given[k] += len(ids) if recipe.mix_by == "tokens" else size
                    seen.add(batch.digests[i])
                    part.add(batch.splits[i], ids, size, batch.digests[i])
                    self._count(batch.splits[i], batch.sources[i], len(ids), size)
                    if part.tokens >= recipe.shard_tokens:
                        self._finish(part, mix)
                        part = self._part()
                    progress.show()
                self._require_both()
                if recipe.max_tokens is not None and not self._enough():
                    self._tell_the_end(recipe.max_tokens, mix)
                if part.tokens:
                    self._finish(part, mix)
            finally:
                part.close()
        return self._facts()

    def _part(self) -> Part:
        return self.run.part(self.dtype, self.recipe.row_length, self.pad)

    def _enough(self) -> bool:
        return self.recipe.max_tokens is not None and self.tokens["train"] >= self.recipe.max_tokens

    def _count(self, split: str, name: str, tokens: int, size: int) -> None:
        self.tokens[split] += tokens
        self.documents += 1
        source = self.sources.setdefault(name, {"documents": 0, "bytes": 0, "tokens": 0})
        source["documents"] += 1
        source["bytes"] += size
        source["tokens"] += tokens

    def _finish(self, part: Part, mix: Mix) -> None:
        state = {"sources": self.sources, "dropped": dict(self.dropped), "given": mix.given}
        # As JSON at once: the counts go on, and the record is of now.
        self.run.finish(part, {"state": json.loads(json.dumps({**state, "positions": mix.positions()}))})

    def _tell_the_end(self, asked: int, mix: Mix) -> None:
        what = f"corpus entry `{mix.ended}`, and with it the mix," if mix.ended else "the corpus"
        print(
            f"{what} ended at {self.tokens['train']:,} tokens for training, and max_tokens asks for {asked:,}; "
            "what is there is packed",
            file=sys.stderr,
            flush=True,
        )

    def _require_both(self) -> None:
        for split in SPLITS:
            if not self.tokens[split]:
                raise UserError(
                    f"the corpus has {self.documents:,} documents, of which none falls into {split} with "
                    f"validation_fraction {self.recipe.validation_fraction}; choose another fraction or a corpus of "
                    "more documents"
                )

    def _facts(self) -> dict[str, Any]:
        splits: dict[str, dict[str, Any]] = {}
        for split in SPLITS:
            shards = [s for record in self.run.records for s in record["shards"] if s["split"] == split]
            digests = "".join(digest for shard in shards for digest in shard["sha256"].values())
            splits[split] = {name: sum(s[name] for s in shards) for name in ("documents", "tokens", "bytes", "rows")}
            splits[split]["sha256"] = hashlib.sha256(digests.encode()).hexdigest()  # of its shards' digests
            splits[split]["shards"] = [{k: v for k, v in shard.items() if k != "split"} for shard in shards]
        return {
            "splits": splits,
            "duplicates_dropped": self.dropped.pop(_DUPLICATE, 0),
            "blank_dropped": self.dropped.pop(BLANK, 0),
            "filtered": dict(sorted(self.dropped.items())),
            "sources": self.sources,
        }


class _Progress:
    """A line to stderr every few seconds: what is done, how fast, and how long it will take where that is known."""

    def __init__(self, packer: _Packer, mix: Mix, every: float = 5.0) -> None:
        self.packer, self.mix, self.every = packer, mix, every
        self.start = self.last = time.perf_counter()
        self.before, self.share = packer.tokens.total(), self._share() or 0.0

    def _share(self) -> float | None:
        limit, read = self.packer.recipe.max_tokens, self.mix.fraction()
        shares = [] if read is None else [read]
        return max([*shares, self.packer.tokens["train"] / limit] if limit else shares, default=None)

    def show(self) -> None:
        now = time.perf_counter()
        if now - self.last < self.every:
            return
        self.last = now
        packer, seconds = self.packer, now - self.start
        tokens, size = packer.tokens.total(), sum(source["bytes"] for source in packer.sources.values())
        line = f"{packer.documents:,} documents, {size / 1e6:,.1f} MB, {tokens:,} tokens, "
        line += f"{(tokens - self.before) / seconds:,.0f} tokens/s"
        share = self._share()
        if share is not None and share > self.share:
            left = seconds * (1 - share) / (share - self.share)
            line += f", {share:.0%}, {artifacts.duration(left)} left"
        print(line, file=sys.stderr, flush=True)
