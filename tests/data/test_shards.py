"""Shards: the same bytes whoever encodes and however often a run is killed, mixed by tokens, checked by hash."""

import errno
import itertools
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from small_doge.data import encoding, mixing, shards
from small_doge.data.corpora import open_corpus
from small_doge.data.packing import PackedTokens, PrepareRecipe, prepare
from small_doge.data.tokenizer import TokenizerRecipe, decode_text, load_tokenizer, train_tokenizer
from small_doge.errors import UserError

WORDS = ["".join(random.Random(i).choices("abcdefghij", k=2 + i % 5)) for i in range(200)]


def texts_of(seed: int, count: int, longest: int = 60) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(1, longest))) + f" {seed} {i}" for i in range(count)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "score": i % 5}) + "\n" for i, text in enumerate(texts)))
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tokenizer, and files a.jsonl to d.jsonl of texts of very different lengths; b has some of a's."""
    folder = tmp_path_factory.mktemp("shards")
    a = texts_of(1, 1500)
    write_jsonl(folder / "a.jsonl", a)
    write_jsonl(folder / "b.jsonl", texts_of(2, 900, 20) + a[:40])
    write_jsonl(folder / "c.jsonl", texts_of(3, 500, 10))
    write_jsonl(folder / "d.jsonl", texts_of(4, 300, 40))
    train_tokenizer(
        TokenizerRecipe(output_dir=str(folder / "tokenizer"), corpus=str(folder / "a.jsonl"), vocab_size=500)
    )
    return folder


def recipe_of(home, output_dir, **changed) -> PrepareRecipe:
    mix = [{"path": str(home / f"{name}.jsonl"), "weight": w} for name, w in zip("abcd", (7, 2, 0.5, 0.5), strict=True)]
    values = {
        "tokenizer": str(home / "tokenizer"),
        "output_dir": str(output_dir),
        "corpus": mix,
        "row_length": 32,
        "validation_fraction": 0.05,
        "shard_tokens": 9000,
        "batch_documents": 23,
        "workers": 1,
    }
    return PrepareRecipe(**{**values, **changed})


def content(folder: Path) -> dict[str, bytes]:
    """Every file but the record of times."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != "stage.json"}


@pytest.fixture(scope="module")
def whole(home):
    folder = prepare(recipe_of(home, home / "whole"))
    assert len(PackedTokens(folder, "train").shards) >= 6
    return folder


SCRIPT = """
import json, os, sys, time
from small_doge.data import encoding, packing, shards
if __name__ == "__main__":
    encoding._ALONE_BYTES = int(os.environ.get("ALONE", encoding._ALONE_BYTES))
    pause, write_json = float(os.environ.get("PAUSE", 0)), shards.artifacts.write_json
    def slow(path, content):
        print("record", path.name, flush=True)
        write_json(path, content)
        time.sleep(pause)
    shards.artifacts.write_json = slow
    packing.prepare(packing.PrepareRecipe(**json.loads(sys.argv[1])))
"""


def start(tmp_path, recipe: PrepareRecipe, **environment: str) -> subprocess.Popen:
    script = tmp_path / "doge"  # under this name the package leaves the model alone, as for the command
    script.write_text(SCRIPT, encoding="utf-8")
    words = [sys.executable, str(script), json.dumps(vars(recipe))]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})


def test_runs_killed_at_any_moment_continue_and_give_the_same_bytes(home, whole, tmp_path):
    out, generator, kills = tmp_path / "out", random.Random(7), 0
    recipe = recipe_of(home, out)
    for _ in range(3):
        process = start(tmp_path, recipe, PAUSE="0.03")
        assert process.stdout is not None
        for line in process.stdout:
            # From the first part of this attempt on: some time before, in or after its writing of another one.
            if line.startswith("record part-"):
                time.sleep(generator.random() * 0.1)
                process.kill()
                break
        process.wait()
        if (out / "stage.json").exists():
            break
        kills += 1
        done = len(list((out / "unfinished").glob("part-*.json")))
        assert done >= kills, "each attempt begins behind the parts of the earlier ones"
    prepare(recipe)
    assert kills >= 2
    assert content(out) == content(whole)


def test_what_a_killed_run_leaves_is_no_hindrance(home, whole, tmp_path):
    out = tmp_path / "out"
    (out / "unfinished").mkdir(parents=True)  # killed as early as can be
    (out / "unfinished" / ".run.json.0123.partial").write_text("{", encoding="utf-8")
    prepare(recipe_of(home, out))
    assert content(out) == content(whole)
    # Killed as late as can be: the parts are there, the manifest and the stage's record are not yet.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards.Run, "close", lambda run: None)
        prepare(recipe_of(home, tmp_path / "late"))
    for name in ("stage.json", "manifest.json"):
        (tmp_path / "late" / name).unlink()
    for name in (".manifest.json.0123.partial", "train-00099.tokens.bin.partial", "train-00098.tokens.bin"):
        (tmp_path / "late" / name).write_bytes(b"part")
    prepare(recipe_of(home, tmp_path / "late"))
    assert content(tmp_path / "late") == content(whole)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
def test_a_killed_run_leaves_no_process_behind(home, tmp_path):
    process = start(tmp_path, recipe_of(home, tmp_path / "out", workers=2), ALONE="0", PAUSE="0.5")
    assert process.stdout is not None
    assert any(line.startswith("record part-00000") for line in process.stdout)
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert len(children) >= 2
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while any(_runs(pid) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(_runs(pid) for pid in children)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_processes_that_encode_change_no_byte(home, whole, tmp_path):
    process = start(tmp_path, recipe_of(home, tmp_path / "out", workers=2, batch_documents=100), ALONE="20000")
    process.communicate()
    assert process.returncode == 0
    assert content(tmp_path / "out") == content(whole)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch_documents=st.integers(1, 80), batch_bytes=st.integers(1, 3000), stops=st.lists(st.integers(1, 4), max_size=4)
)
def test_batches_and_interruptions_change_no_byte(
    home, whole, tmp_path_factory, monkeypatch, batch_documents, batch_bytes, stops
):
    out = tmp_path_factory.mktemp("again") / "out"
    recipe = recipe_of(home, out, batch_documents=batch_documents)
    with monkeypatch.context() as patch:
        patch.setattr(mixing, "_BATCH_BYTES", batch_bytes)
        finish = shards.Run.finish
        for stop in stops:
            left = [stop]

            def stops_after(run, part, record, left=left):
                finish(run, part, record)
                left[0] -= 1
                if not left[0]:
                    raise KeyboardInterrupt

            patch.setattr(shards.Run, "finish", stops_after)
            try:
                prepare(recipe)
            except KeyboardInterrupt:
                assert not list(out.glob("*.partial"))
        patch.setattr(shards.Run, "finish", finish)
        prepare(recipe)
    assert content(out) == content(whole)


def test_tokens_are_mixed_in_their_shares_in_every_shard(home, tmp_path):
    out = prepare(recipe_of(home, tmp_path / "out", shard_tokens=20_000))
    tokenizer = load_tokenizer(home / "tokenizer")
    source_of = {d.text: d.source for name in "dcba" for d in open_corpus(str(home / f"{name}.jsonl"))}
    shares = dict(zip((str(home / f"{name}.jsonl") for name in "abcd"), (0.7, 0.2, 0.05, 0.05), strict=True))
    total, longest = dict.fromkeys(shares, 0), 0
    rows = {split: PackedTokens(out, split) for split in ("train", "validation")}
    numbers = [shard["name"][-5:] for shard in rows["train"].shards]
    assert len(numbers) >= 3
    for number in numbers[:-1]:
        found = dict.fromkeys(shares, 0)
        for data in rows.values():
            for k, shard in enumerate(data.shards):
                if shard["name"].endswith(number):
                    tokens, offsets = data.shard(k)
                    for first, last in itertools.pairwise(offsets):
                        found[source_of[decode_text(tokenizer, tokens[first:last])]] += int(last - first)
                        longest = max(longest, int(last - first))
        for name, share in shares.items():
            total[name] += found[name]
            assert found[name] / sum(found.values()) == pytest.approx(share, abs=0.01)
        # And from the first shard to here no source is off by more than a document.
        for name, share in shares.items():
            assert abs(total[name] - share * sum(total.values())) <= longest
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    tokens = {name: facts["tokens"] for name, facts in manifest["sources"].items()}
    for name, share in shares.items():
        assert tokens[name] / sum(tokens.values()) == pytest.approx(share, rel=0.01)


def test_weights_can_count_bytes(home, tmp_path):
    out = prepare(recipe_of(home, tmp_path / "out", mix_by="bytes"))
    sources = json.loads((out / "manifest.json").read_text(encoding="utf-8"))["sources"]
    sizes = [sources[str(home / f"{name}.jsonl")]["bytes"] for name in "ab"]
    assert sizes[0] / sizes[1] == pytest.approx(3.5, rel=0.01)


def test_duplicates_are_found_across_sources_shards_and_a_restart(home, tmp_path, monkeypatch):
    corpus = [str(home / "a.jsonl"), str(home / "b.jsonl")]
    once = prepare(recipe_of(home, tmp_path / "once", corpus=corpus))
    assert json.loads((once / "manifest.json").read_text(encoding="utf-8"))["duplicates_dropped"] == 40
    finish, calls = shards.Run.finish, []

    def breaks(run, part, record):
        finish(run, part, record)
        calls.append(part.number)
        if part.number == 3 and calls.count(3) == 1:
            raise OSError(errno.EIO, "the cable")

    monkeypatch.setattr(shards.Run, "finish", breaks)
    with pytest.raises(OSError, match="the cable"):
        prepare(recipe_of(home, tmp_path / "twice", corpus=corpus))
    twice = prepare(recipe_of(home, tmp_path / "twice", corpus=corpus))
    assert content(twice) == content(once)


def test_rows_and_documents_go_across_shards(home, whole):
    rows = PackedTokens(whole, "train")
    tokenizer = load_tokenizer(home / "tokenizer")
    documents = [decode_text(tokenizer, ids) for ids in rows.documents()]
    assert len(documents) == rows.manifest["splits"]["train"]["documents"]
    assert documents[0] == next(iter(open_corpus(str(home / "a.jsonl")))).text
    flat = np.concatenate([rows[i]["input_ids"].numpy() for i in range(len(rows))])
    mapped = np.concatenate([rows.shard(k)[0] for k in range(len(rows.shards))])
    assert np.array_equal(flat, mapped)
    assert [shard["name"] for shard in rows.shards[:2]] == ["train-00000", "train-00001"]
    for k, shard in enumerate(rows.shards):
        assert rows[int(rows.first_rows[k])]["position_ids"][0] == 0, "a shard begins with a document"
        assert shard["tokens"] <= shard["rows"] * 32 < shard["tokens"] + 32


def test_a_number_of_tokens_can_be_asked_for(home, tmp_path):
    out = prepare(recipe_of(home, tmp_path / "out", max_tokens=20_000))
    assert 20_000 <= PackedTokens(out, "train").manifest["splits"]["train"]["tokens"] < 20_000 + 500


def test_asking_for_more_tokens_than_there_are_is_told(home, tmp_path, capsys):
    prepare(recipe_of(home, tmp_path / "one", corpus=str(home / "c.jsonl"), max_tokens=10**6))
    assert "the corpus ended at " in capsys.readouterr().err
    prepare(recipe_of(home, tmp_path / "mix", max_tokens=10**6))
    said = capsys.readouterr().err
    assert "jsonl`, and with it the mix, ended at" in said
    assert "and max_tokens asks for 1,000,000; what is there is packed" in said


@pytest.mark.parametrize("kind", ["tokens", "documents"])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_flipped_byte_is_found_when_opened_and_by_verify(home, tmp_path, capsys, kind, split):
    out = prepare(recipe_of(home, tmp_path / "out"))
    prepare(recipe_of(home, out, verify=True))
    assert "are whole" in capsys.readouterr().out
    path = out / f"{split}-00001.{kind}.bin"
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    for check in (lambda: PackedTokens(out, split), lambda: prepare(recipe_of(home, out, verify=True))):
        with pytest.raises(UserError, match=rf"{split}-00001\.{kind}\.bin is damaged: its SHA-256 is \w+…, expected"):
            check()


def test_large_data_is_opened_without_reading_it_all(home, whole, monkeypatch):
    from small_doge.data import packed

    monkeypatch.setattr(packed, "CHECKED_AT_ONCE", 1000)
    monkeypatch.setattr(packed.artifacts, "sha256", lambda path: pytest.fail("read"))
    PackedTokens(whole, "train")


def test_a_disk_that_fills_keeps_finished_shards_and_the_run_goes_on(home, whole, tmp_path, monkeypatch):
    out, write, written = tmp_path / "out", shards._Shard._write, [0]

    def fills(shard, kind, content):
        written[0] += len(content)
        if written[0] > 60_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(shard, kind, content)

    monkeypatch.setattr(shards._Shard, "_write", fills)
    with pytest.raises(
        UserError, match="is full, expected room for the next shard; 3 finished parts are kept, and the"
    ):
        prepare(recipe_of(home, out))
    names = {path.name for path in out.iterdir()}
    assert "train-00002.tokens.bin" in names
    assert "train-00003.tokens.bin" not in names
    assert not any(name.endswith(".partial") for name in names)
    with pytest.raises(UserError, match="it is unfinished, run the same command again"):
        PackedTokens(out, "train")
    monkeypatch.setattr(shards._Shard, "_write", write)
    prepare(recipe_of(home, out))
    assert content(out) == content(whole)


def test_another_corpus_or_recipe_does_not_continue_a_run(home, tmp_path, monkeypatch):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_bytes((home / "a.jsonl").read_bytes())
    recipe = recipe_of(home, tmp_path / "out", corpus=str(corpus))
    finish = shards.Run.finish

    def interrupted(run, part, record):
        finish(run, part, record)
        raise KeyboardInterrupt

    monkeypatch.setattr(shards.Run, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(recipe)
    before = content_deep(tmp_path / "out")
    with pytest.raises(UserError, match="`row_length` is 32 there and 64 here"):
        prepare(recipe_of(home, tmp_path / "out", corpus=str(corpus), row_length=64))
    with corpus.open("a", encoding="utf-8") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(UserError, match="the corpus has other files, or files of other sizes, than when the run in"):
        prepare(recipe)
    (tmp_path / "out" / "train-00000.tokens.bin").write_bytes(b"short")
    corpus.write_bytes((home / "a.jsonl").read_bytes())
    with pytest.raises(UserError, match=r"train-00000\.tokens\.bin has 5 bytes, expected .* prepare again"):
        prepare(recipe)
    assert content_deep(tmp_path / "out").keys() == before.keys()


def test_a_disk_too_small_for_what_is_asked_is_told_before(home, tmp_path):
    with pytest.raises(UserError, match="MiB free, and what is still to be packed needs about"):
        prepare(recipe_of(home, tmp_path / "out", max_tokens=10**15))
    assert not (tmp_path / "out").exists()


def content_deep(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_progress_says_what_is_left(home, tmp_path, monkeypatch, capsys):
    from small_doge.data import packing

    class Often(packing._Progress):
        def __init__(self, packer, mix):
            super().__init__(packer, mix, every=0)

    monkeypatch.setattr(packing, "_Progress", Often)
    prepare(recipe_of(home, tmp_path / "out"))
    lines = capsys.readouterr().err.splitlines()
    said = [line for line in lines if "tokens/s, " in line and line.endswith(" left")]
    shares = [int(line.split("%")[0].split()[-1]) for line in said]
    assert shares == sorted(shares)
    assert shares[0] <= 5
    assert 80 <= shares[-1] <= 100


def test_a_process_that_dies_is_reported(home, monkeypatch):
    class Broken:
        def submit(self, *_):
            raise encoding.BrokenProcessPool

        def shutdown(self, **_):
            pass

    tokenizer = load_tokenizer(home / "tokenizer")
    with encoding.Pool(encoding.Work("", 0, 1, "<u2", 0.1, {}), tokenizer, 1) as pool:
        pool.executor = Broken()  # type: ignore[assignment]
        with pytest.raises(UserError, match="a process that encodes ended unexpectedly"):
            pool.submit([])
