"""Packed tokens against a reconstruction by hand, and what happens when files or settings are wrong."""

import hashlib
import json
import pickle
import random
import shutil

import numpy as np
import pytest
import torch

from small_doge.data import encoding, mixing, packing
from small_doge.data.corpora import Document, open_corpus, split_of
from small_doge.data.packing import PackedTokens, PrepareRecipe, collate, prepare, require_vocabulary
from small_doge.data.tokenizer import TokenizerRecipe, decode_text, encode_text, load_tokenizer, train_tokenizer
from small_doge.errors import UserError

LENGTH, FRACTION = 16, 0.2


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with corpus.jsonl (some long documents, some of a letter, duplicates, blanks) and a tokenizer."""
    folder = tmp_path_factory.mktemp("packing")
    generator = random.Random(1)
    words = ["".join(generator.choices("abcdefghij", k=generator.randint(2, 6))) for _ in range(200)]
    texts = [" ".join(generator.choices(words, k=generator.choice([1, 1, 3, 30]))) + f" {i} é" for i in range(150)]
    texts += [texts[3], texts[5], " \n", "x", "a text with <|end_of_text|> spelled out"]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (folder / "corpus.jsonl").write_text("".join(lines), encoding="utf-8")
    train_tokenizer(
        TokenizerRecipe(
            output_dir=str(folder / "tokenizer"),
            corpus=str(folder / "corpus.jsonl"),
            vocab_size=500,
            validation_fraction=FRACTION,
        )
    )
    return folder


def recipe_of(home, output_dir, **changed) -> PrepareRecipe:
    values = {
        "tokenizer": str(home / "tokenizer"),
        "output_dir": str(output_dir),
        "corpus": str(home / "corpus.jsonl"),
        "row_length": LENGTH,
        "validation_fraction": FRACTION,
        "batch_documents": 7,
    }
    return PrepareRecipe(**{**values, **changed})


@pytest.fixture(scope="module")
def packed(home):
    return prepare(recipe_of(home, home / "packed"))


def texts_by_hand(home, split: str) -> list[str]:
    texts: list[str] = []
    for document in open_corpus(str(home / "corpus.jsonl")):
        text = document.text
        if text.strip() and text not in texts and split_of(Document("", text, ""), FRACTION) == split:
            texts.append(text)
    return texts


def rows_by_hand(home, split: str) -> list[dict[str, list[int]]]:
    """Token by token: its id, its place in its document or row, its label."""
    tokenizer = load_tokenizer(home / "tokenizer")
    ids, starts, labels = [], [], []
    for text in texts_by_hand(home, split):
        tokens = [0, *encode_text(tokenizer, [text])[0], 1]
        ids += tokens
        starts += [True] + [False] * (len(tokens) - 1)
        labels += [-100, *tokens[1:]]
    padding = -len(ids) % LENGTH
    ids += [2] * padding
    starts += [k == 0 for k in range(padding)]
    labels += [-100] * padding
    rows = []
    for first in range(0, len(ids), LENGTH):
        positions: list[int] = []
        for k in range(first, first + LENGTH):
            positions.append(0 if starts[k] or not positions else positions[-1] + 1)
        cut = slice(first, first + LENGTH)
        rows.append({"input_ids": ids[cut], "position_ids": positions, "labels": labels[cut]})
    return rows


@pytest.mark.parametrize("split", ["train", "validation"])
def test_rows_are_those_of_a_reconstruction_by_hand(home, packed, split):
    rows = PackedTokens(packed, split)
    expected = rows_by_hand(home, split)
    assert len(rows) == len(expected)
    for i, row in enumerate(expected):
        found = rows[i]
        assert all(tensor.dtype == torch.int64 and tensor.shape == (LENGTH,) for tensor in found.values())
        assert {name: tensor.tolist() for name, tensor in found.items()} == row
    assert rows[-1]["input_ids"].tolist() == expected[-1]["input_ids"]
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_the_corpus_exercises_every_kind_of_row(home):
    rows = rows_by_hand(home, "train")
    assert any(row["position_ids"].count(0) > 2 for row in rows), "several documents in a row"
    assert any(row["position_ids"] == list(range(LENGTH)) and row["input_ids"][0] != 0 for row in rows), "none begins"
    assert rows[-1]["input_ids"][-1] == 2, "padding"


@pytest.mark.parametrize("extra", range(LENGTH))
def test_positions_and_labels_for_every_amount_of_padding(home, tmp_path, monkeypatch, extra):
    # A document of each length, so that the last row ends with padding of every amount, none included.
    monkeypatch.setattr(encoding, "encode_text", lambda tokenizer, texts: [[9] * (LENGTH + extra - 2) for _ in texts])
    monkeypatch.setattr(
        encoding, "split_of", lambda document, fraction: "validation" if document.text == "x" else "train"
    )
    (tmp_path / "two.jsonl").write_text('{"text": "x"}\n{"text": "y"}\n', encoding="utf-8")
    rows = PackedTokens(prepare(recipe_of(home, tmp_path / "out", corpus=str(tmp_path / "two.jsonl"))), "train")
    batch = collate([rows[i] for i in range(len(rows))])
    padding = -extra % LENGTH
    labels = batch["labels"].flatten().tolist()
    assert labels == [-100, *[9] * (LENGTH + extra - 2), 1, *[-100] * padding]
    assert batch["position_ids"].flatten().tolist() == [*range(LENGTH), *range(extra), *range(padding)]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_documents_come_back_whole_with_one_begin_and_one_end_token_each(home, packed, split):
    tokenizer = load_tokenizer(home / "tokenizer")
    found = list(PackedTokens(packed, split).documents())
    for ids in found:
        assert ids.dtype == np.int64
        assert (ids[0], ids[-1]) == (0, 1)
        assert not set(ids[1:-1].tolist()) & set(range(16))
    assert [decode_text(tokenizer, ids) for ids in found] == texts_by_hand(home, split)


def test_the_manifest_counts_what_is_there(home, packed):
    manifest = json.loads((packed / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["format"] == 2
    assert (manifest["row_length"], manifest["dtype"], manifest["vocab_size"]) == (LENGTH, "uint16", 500)
    assert (manifest["duplicates_dropped"], manifest["blank_dropped"]) == (2, 1)
    assert manifest["corpus"] == str(home / "corpus.jsonl")
    tokenizer_file = home / "tokenizer" / "tokenizer.json"
    assert manifest["tokenizer_sha256"] == hashlib.sha256(tokenizer_file.read_bytes()).hexdigest()
    total = {"documents": 0, "bytes": 0, "tokens": 0}
    for split, facts in manifest["splits"].items():
        rows, texts = PackedTokens(packed, split), texts_by_hand(home, split)
        assert facts["documents"] == len(texts)
        assert facts["bytes"] == sum(len(text.encode()) for text in texts)
        assert facts["tokens"] == sum(len(ids) for ids in rows.documents())
        predicted = sum((row["labels"] != -100).sum().item() for row in (rows[i] for i in range(len(rows))))
        assert rows.bytes_per_token() == pytest.approx(facts["bytes"] / predicted)
        for shard in facts["shards"]:
            for kind, digest in shard["sha256"].items():
                content = (packed / f"{shard['name']}.{kind}.bin").read_bytes()
                assert hashlib.sha256(content).hexdigest() == digest
        total = {name: total[name] + facts[name] for name in total}
    assert manifest["sources"] == {str(home / "corpus.jsonl"): total}


def test_no_text_is_on_both_sides_and_more_documents_move_none(home, packed, tmp_path):
    tokenizer = load_tokenizer(home / "tokenizer")
    more = tmp_path / "more.jsonl"
    added = "".join(json.dumps({"text": f"added {i}"}) + "\n" for i in range(50))
    more.write_text(added + (home / "corpus.jsonl").read_text(encoding="utf-8"), encoding="utf-8")
    grown = prepare(recipe_of(home, tmp_path / "grown", corpus=str(more)))
    sides = {}
    for folder in (packed, grown):
        for split in ("train", "validation"):
            sides[folder, split] = {decode_text(tokenizer, ids) for ids in PackedTokens(folder, split).documents()}
        assert not sides[folder, "train"] & sides[folder, "validation"]
    for split in ("train", "validation"):
        assert sides[packed, split] < sides[grown, split]


def test_batches_do_not_change_what_is_written(home, packed, tmp_path, monkeypatch):
    monkeypatch.setattr(mixing, "_BATCH_BYTES", 200)
    other = prepare(recipe_of(home, tmp_path / "other", batch_documents=1000))
    assert (other / "manifest.json").read_bytes() == (packed / "manifest.json").read_bytes()


def test_tokens_are_mapped_not_read_and_a_pickled_copy_maps_them_again(packed):
    rows = PackedTokens(packed, "train")
    assert all(isinstance(mapped, np.memmap) for mapped in rows.shard(0))
    pickled = pickle.dumps(rows)
    assert len(pickled) < 1000
    copy = pickle.loads(pickled)  # noqa: S301 - our own
    assert all(isinstance(mapped, np.memmap) for mapped in copy.shard(0))
    assert torch.equal(copy[1]["input_ids"], rows[1]["input_ids"])


def test_a_data_loader_takes_it(packed):
    rows = PackedTokens(packed, "train")
    batches = list(torch.utils.data.DataLoader(rows, batch_size=4, collate_fn=collate))
    assert batches[0]["labels"].shape == (4, LENGTH)
    assert torch.equal(torch.cat([batch["input_ids"] for batch in batches])[5], rows[5]["input_ids"])


def test_a_large_vocabulary_takes_four_bytes_a_token(home, packed, tmp_path, monkeypatch):
    class Large:
        bos_token_id, eos_token_id, pad_token_id = 0, 70_001, 2
        bos_token = eos_token = ""

        def __len__(self):
            return 70_002

    monkeypatch.setattr(packing, "load_tokenizer", lambda folder: Large())
    monkeypatch.setattr(encoding, "encode_text", lambda tokenizer, texts: [[70_000]] * len(texts))
    rows = PackedTokens(prepare(recipe_of(home, tmp_path / "large")), "train")
    assert rows.manifest["dtype"] == "uint32"
    assert rows[0]["input_ids"][:4].tolist() == [0, 70_000, 70_001, 0]


def test_the_same_settings_return_at_once_and_others_are_refused(home, packed, capsys):
    before = (packed / "manifest.json").stat().st_mtime_ns
    assert prepare(recipe_of(home, packed)) == packed
    assert "already there" in capsys.readouterr().out
    assert (packed / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="`row_length` is 16 there and 32 here"):
        prepare(recipe_of(home, packed, row_length=32))


def test_a_run_that_breaks_off_leaves_nothing(home, tmp_path, monkeypatch):
    calls = []

    def breaks(tokenizer, texts):
        calls.append(texts)
        if len(calls) == 3:
            assert any(tmp_path.iterdir()), "something was being written"
            raise KeyboardInterrupt
        return encode_text(tokenizer, texts)

    monkeypatch.setattr(encoding, "encode_text", breaks)
    with pytest.raises(KeyboardInterrupt):
        prepare(recipe_of(home, tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"row_length": 7}, "row_length is 7, expected at least 8"),
        ({"validation_fraction": 0.0}, "validation_fraction is 0.0, expected a number between 0 and 1"),
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0"),
        ({"validation_fraction": 1e-9}, "152 documents, of which none falls into validation"),
        ({"validation_fraction": 1 - 1e-9}, "152 documents, of which none falls into train"),
        ({"batch_documents": 0}, "batch_documents is 0"),
        ({"tokenizer": "nowhere"}, r"nowhere holds no tokenizer\.json"),
        ({"corpus": {"path": "nowhere"}}, "nowhere does not exist"),
    ],
)
def test_mistakes_are_named_and_leave_the_disk_as_it_was(home, tmp_path, changed, sentence):
    with pytest.raises(UserError, match=sentence):
        prepare(recipe_of(home, tmp_path / "out", **changed))
    assert list(tmp_path.iterdir()) == []


def test_a_bad_line_late_in_the_corpus_leaves_nothing(home, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n' * 40 + "{oops\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"bad\.jsonl, line 41, is not JSON"):
        prepare(recipe_of(home, tmp_path / "out", corpus=str(tmp_path / "bad.jsonl")))
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


def test_opening_what_is_absent_cut_short_or_of_another_format(packed, tmp_path):
    with pytest.raises(UserError, match=r"holds no manifest\.json"):
        PackedTokens(tmp_path, "train")
    with pytest.raises(UserError, match="no split `test`, expected train or validation"):
        PackedTokens(packed, "test")
    copy = tmp_path / "copy"
    shutil.copytree(packed, copy)
    for name in ("train-00000.tokens.bin", "train-00000.documents.bin"):
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content[:-8])
        with pytest.raises(UserError, match=f"{name} was cut short: it has .* bytes, expected"):
            PackedTokens(copy, "train")
        (copy / name).unlink()
        with pytest.raises(UserError, match=f"{name} does not exist"):
            PackedTokens(copy, "train")
        (copy / name).write_bytes(content)
    PackedTokens(copy, "train")
    manifest = json.loads((copy / "manifest.json").read_text(encoding="utf-8"))
    (copy / "manifest.json").write_text(json.dumps({**manifest, "format": 1}), encoding="utf-8")
    with pytest.raises(UserError, match="is of format 1, expected 2; pack the corpus again"):
        PackedTokens(copy, "train")


def test_the_tokenizer_and_the_vocabulary_are_checked(home, packed, tmp_path):
    rows = PackedTokens(packed, "train")
    tokenizer = load_tokenizer(home / "tokenizer")
    tokenizer(["a", "abc"], padding=True, truncation=True, max_length=5)
    tokenizer.save_pretrained(tmp_path / "used")  # its tokenizer.json now holds padding and truncation
    rows.check_tokenizer(tmp_path / "used")
    content = json.loads((home / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["merges"].pop()
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match="is not the one that"):
        rows.check_tokenizer(tmp_path)
    require_vocabulary(packed, 500)
    require_vocabulary(packed, 512)
    with pytest.raises(UserError, match="vocabulary of 500, and the model has 499"):
        require_vocabulary(packed, 499)
