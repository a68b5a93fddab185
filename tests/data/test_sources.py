"""Published parts by name, prompts as chat turns, texts from a bucket, filters, streams taken up where they stood."""

import gzip
import itertools
import json
import random
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from small_doge.data import software_heritage
from small_doge.data.corpora import PUBLISHED, Document, open_corpus
from small_doge.data.documents import Columns
from small_doge.data.filters import check_filters, make_filter, repeated_lines
from small_doge.data.packing import PackedTokens, PrepareRecipe, prepare
from small_doge.data.streams import Fetched, Plain
from small_doge.data.tokenizer import TokenizerRecipe, decode_text, load_tokenizer, train_tokenizer
from small_doge.errors import UserError


def rows_to(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def parquet_to(path, rows):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=3)
    return path


COSMOPEDIA = [
    {"prompt": f"Write story {i}.", "text": f" Once upon a time {i}, <|end_of_text|> it was é.\n", "format": "story"}
    for i in range(12)
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    words = "once upon a time write story it was the end of text".split()
    generator = random.Random(0)
    texts = [{"text": " ".join(generator.choices(words, k=30)) + f" {i}"} for i in range(100)]
    rows_to(folder / "plain.jsonl", texts)
    train_tokenizer(
        TokenizerRecipe(
            output_dir=str(folder / "tokenizer"), corpus=str(folder / "plain.jsonl"), vocab_size=330, min_frequency=1
        )
    )
    return folder


@pytest.fixture
def hub(tmp_path):
    """A folder of the shape of HuggingFaceTB/smollm-corpus."""
    pytest.importorskip("datasets")
    parquet_to(tmp_path / "cosmopedia-v2" / "train-00000.parquet", COSMOPEDIA[:7])
    parquet_to(tmp_path / "cosmopedia-v2" / "train-00001.parquet", COSMOPEDIA[7:])
    fine = [{"text": f"lesson {i}", "score": 2.5 + i / 4} for i in range(8)]
    parquet_to(tmp_path / "fineweb-edu-dedup" / "train-00000.parquet", fine)
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/*\n"
        for name in ("cosmopedia-v2", "fineweb-edu-dedup")
    )
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n", encoding="utf-8")
    return tmp_path


def test_published_parts_are_read_by_name(hub, monkeypatch):
    import datasets

    asked, load = [], datasets.load_dataset

    def at_hand(name, subset=None, **options):
        asked.append((name, subset, options))
        return load(str(hub), subset, **options)

    monkeypatch.setattr(datasets, "load_dataset", at_hand)
    found = list(open_corpus("cosmopedia-v2"))
    assert asked == [("HuggingFaceTB/smollm-corpus", "cosmopedia-v2", {"split": "train", "streaming": True})]
    assert [(d.prompt, d.text) for d in found] == [(row["prompt"], row["text"]) for row in COSMOPEDIA]
    assert {d.source for d in found} == {"cosmopedia-v2"}
    scored = open_corpus({"name": "fineweb-edu-dedup", "min_score": 3})
    assert [d.text for d in scored] == [f"lesson {i}" for i in range(2, 8)]
    assert {"fineweb-edu-dedup", "cosmopedia-v2", "python-edu", "open-web-math", "finemath-4plus"} == PUBLISHED.keys()


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("python-edo", "`python-edo` is neither `stdlib` nor a file"),
        (
            {"name": "python_edu"},
            r"no built-in corpus `python_edu` \(did you mean `python-edu`\?\), expected stdlib, f",
        ),
        ({"path": ".", "min_score": "high"}, "`min_score` is 'high', expected a number"),
        ({"path": ".", "score_field": "score"}, "has a `score_field` and no `min_score`"),
        ({"path": ".", "prompt_field": 3}, "`prompt_field` is 3, expected text"),
    ],
)
def test_wrong_entries_are_refused(spec, sentence):
    with pytest.raises(UserError, match=sentence):
        open_corpus(spec)


def test_a_dataset_that_is_not_there_is_named(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def absent(name, *_, **__):
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub\nmore\nlines")

    monkeypatch.setattr(datasets, "load_dataset", absent)
    with pytest.raises(UserError, match=r"\(subset None, split train\) cannot be read: Dataset 'a/b' doesn't exist on"):
        list(open_corpus({"dataset": "a/b"}))


def test_scores_are_numbers(tmp_path):
    path = rows_to(tmp_path / "a.jsonl", [{"text": "x", "score": 3}, {"text": "y", "score": "4"}])
    with pytest.raises(UserError, match=r"line 2, has a str in the field `score`, expected a number"):
        list(open_corpus({"path": str(path), "min_score": 3}))
    with pytest.raises(UserError, match=r"line 1, lacks the field `quality`; the fields there are `text`, `score`"):
        list(open_corpus({"path": str(path), "min_score": 3, "score_field": "quality"}))


# ---- prompts --------------------------------------------------------------------------------------------------------


def recipe_of(home, output_dir, corpus, **changed):
    fields = {"tokenizer": str(home / "tokenizer"), "output_dir": str(output_dir), "corpus": corpus, "row_length": 64}
    return PrepareRecipe(**{**fields, "validation_fraction": 0.3, **changed})


def test_a_prompt_and_its_text_become_a_chat_turn(home, tmp_path):
    from small_doge.evaluation.bits_per_byte import bits_per_byte  # noqa: F401 - what divides by these bytes is there

    path = rows_to(tmp_path / "rows.jsonl", [*COSMOPEDIA, COSMOPEDIA[0], {"prompt": " ", "text": "x"}])
    out = prepare(recipe_of(home, tmp_path / "out", {"name": "cosmopedia-v2", "path": str(path)}))
    tokenizer = load_tokenizer(home / "tokenizer")
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    expected = {
        header.format("user") + row["prompt"] + header.format("assistant") + row["text"].strip() for row in COSMOPEDIA
    }
    found: list[str] = []
    for split in ("train", "validation"):
        data = PackedTokens(out, split)
        texts = []
        for ids in data.documents():
            assert (ids[0], ids[-1], list(ids).count(0), list(ids).count(1)) == (0, 1, 1, 2)
            texts.append(decode_text(tokenizer, ids.tolist()))
        assert data.manifest["splits"][split]["bytes"] == sum(len(text.encode()) for text in texts)
        found += texts
    assert set(found) == expected
    assert len(found) == len(expected)
    manifest = data.manifest
    assert (manifest["duplicates_dropped"], manifest["blank_dropped"]) == (1, 1)
    assert manifest["sources"].keys() == {"cosmopedia-v2"}


def test_a_turn_is_what_the_chat_template_gives(home, tmp_path):
    row = {"prompt": "Write.", "text": "Once upon a time."}
    path = rows_to(tmp_path / "rows.jsonl", [row, *COSMOPEDIA])
    out = prepare(recipe_of(home, tmp_path / "out", {"path": str(path), "prompt_field": "prompt"}))
    messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["text"]}]
    expected = load_tokenizer(home / "tokenizer").apply_chat_template(messages, return_dict=True)["input_ids"]
    every = [ids.tolist() for split in ("train", "validation") for ids in PackedTokens(out, split).documents()]
    assert expected in every


def test_a_tokenizer_without_a_template_is_refused_for_prompts(home, tmp_path):
    tokenizer = load_tokenizer(home / "tokenizer")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "bare")
    path = rows_to(tmp_path / "rows.jsonl", COSMOPEDIA)
    recipe = recipe_of(home, tmp_path / "out", {"name": "cosmopedia-v2", "path": str(path)})
    recipe.tokenizer = str(tmp_path / "bare")
    with pytest.raises(UserError, match="has no chat template"):
        prepare(recipe)
    assert not (tmp_path / "out").exists()


# ---- blobs ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(monkeypatch):
    """Software Heritage's bucket with blobs 0 to 39, of which every seventh is not there, and one not gzip."""
    moto, boto3 = pytest.importorskip("moto"), pytest.importorskip("boto3")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    with moto.mock_aws():
        client = boto3.client("s3", region_name=software_heritage.REGION)
        client.create_bucket(Bucket=software_heritage.BUCKET)

        def put(blob, body):
            client.put_object(Bucket=software_heritage.BUCKET, Key=f"content/{blob}", Body=body, ACL="public-read")

        for i in range(40):
            if i % 7:
                put(f"b{i}", gzip.compress(f"print({i})  # é".encode() + b"\xff", mtime=0))
        put("plain", b"not gzip")
        yield put


def blobs_in(folder, ids, kind=rows_to):
    return kind(folder, [{"blob_id": blob, "repo_name": "a/b", "score": 4.0, "length_bytes": 9} for blob in ids])


@pytest.mark.parametrize("kind", [rows_to, parquet_to])
def test_blobs_become_texts_in_order_and_missing_ones_are_counted(bucket, home, tmp_path, kind):
    suffix = "jsonl" if kind is rows_to else "parquet"
    path = blobs_in(tmp_path / f"rows.{suffix}", [f"b{i}" for i in range(40)], kind)
    corpus = {"name": "python-edu", "path": str(path)}
    assert [d.text for d in open_corpus(corpus)] == [f"print({i})  # é" for i in range(40) if i % 7]
    out = prepare(recipe_of(home, tmp_path / "out", corpus))
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["filtered"] == {"blob missing": 6}
    assert sum(split["documents"] for split in manifest["splits"].values()) == 34


def test_wrong_blobs_are_told(bucket, tmp_path):
    path = blobs_in(tmp_path / "rows.jsonl", ["plain"])
    with pytest.raises(UserError, match="blob plain of Software Heritage is not gzip"):
        list(open_corpus({"name": "python-edu", "path": str(path)}))
    path = blobs_in(tmp_path / "rows.jsonl", ["b1", *(f"x{i}" for i in range(200))])
    with pytest.raises(
        UserError, match=r"100 blobs of .* in a row are not in Software Heritage's bucket \(the last is 'x99'"
    ):
        list(open_corpus({"name": "python-edu", "path": str(path)}))


def test_the_bucket_is_asked_again_when_it_fails_and_without_an_account(monkeypatch):
    botocore = pytest.importorskip("botocore")
    pytest.importorskip("boto3")
    from botocore.awsrequest import AWSResponse
    from botocore.httpsession import URLLib3Session

    asked = []

    class Raw:
        def __init__(self, body):
            self.body = body

        def stream(self, *_, **__):
            yield self.body

        def read(self, *_):
            body, self.body = self.body, b""
            return body

    def send(self, request):
        asked.append(request)
        if len(asked) == 1:
            raise botocore.exceptions.ConnectionClosedError(endpoint_url=request.url)
        if len(asked) < 4:
            return AWSResponse(request.url, 503, {}, Raw(b"<Error><Code>SlowDown</Code></Error>"))
        body = gzip.compress(b"text", mtime=0)
        return AWSResponse(request.url, 200, {"content-length": str(len(body))}, Raw(body))

    monkeypatch.setattr(URLLib3Session, "send", send)
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    assert software_heritage.fetcher()("abc") == "text"
    assert len(asked) == 4
    assert len([wait for wait in waits if wait > 0]) >= 1
    assert "softwareheritage" in asked[-1].url
    assert asked[-1].url.endswith("/content/abc")
    assert not {name.lower() for name in asked[-1].headers} & {"authorization"}


def test_without_boto3_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "boto3", None)
    with pytest.raises(UserError, match=r'install it with `pip install "small-doge\[smollm\]"`'):
        software_heritage.fetcher()


def test_blobs_are_fetched_side_by_side():
    together = threading.Barrier(8, timeout=20)

    def fetch(blob):
        together.wait()
        return blob.upper()

    stream = Plain(lambda: (Document(str(i), f"b{i}", "s") for i in range(16)))
    assert [d.text for d in Fetched(stream, fetch)] == [f"B{i}" for i in range(16)]


# ---- taking up ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """Every kind of file, some of them of many rows."""
    pytest.importorskip("pyarrow")
    folder = tmp_path_factory.mktemp("shelf")
    parquet_to(folder / "a.parquet", [{"text": f"a{i}"} for i in range(11)])
    (folder / "b.jsonl").write_text("\n\n".join(json.dumps({"text": f"b{i}"}) for i in range(5)) + "\n\n")
    (folder / "c.txt").write_text("c")
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "d0"}\n{"text": "d1"}\n'))
    (folder / "e.md").write_text("e")
    return folder


@settings(deadline=None)
@given(stop=st.integers(0, 22), limit=st.one_of(st.none(), st.integers(1, 25)))
def test_files_are_taken_up_at_any_place(shelf, stop, limit):
    corpus = open_corpus({"path": str(shelf), "max_documents": limit} if limit else str(shelf))
    every = [d.text for d in corpus]
    stream = corpus.open(None)
    documents = iter(stream)
    first = [d.text for d in itertools.islice(documents, stop)]
    # What the position says has been through JSON.
    place = json.loads(json.dumps(stream.position()))
    assert first + [d.text for d in corpus.open(place)] == every
    assert stream.fraction() is None or 0 <= stream.fraction() <= 1


@pytest.mark.parametrize("stop", [0, 1, 6, 7, 8, 11, 12])
def test_a_dataset_is_taken_up_at_any_place(hub, stop):
    corpus = open_corpus({"dataset": str(hub), "subset": "cosmopedia-v2"})
    every = [(d.id, d.text) for d in corpus]
    assert len(every) == 12
    stream = corpus.open(None)
    documents = iter(stream)
    first = [(d.id, d.text) for d in (next(documents) for _ in range(stop))]
    place = json.loads(json.dumps(stream.position()))
    assert first + [(d.id, d.text) for d in corpus.open(place)] == every


@given(st.integers(0, 30))
@settings(deadline=None)
def test_fetched_texts_are_taken_up_at_any_place(stop):
    def open_at(place):
        ids = Plain(lambda: (Document(str(i), f"b{i}", "s") for i in range(30)), place)
        return Fetched(ids, lambda blob: None if blob == "b3" else blob.upper())

    every = [(d.text, d.unfit) for d in open_at(0)]
    assert every[3] == ("", "blob missing")
    stream = open_at(0)
    documents = iter(stream)
    first = [(d.text, d.unfit) for d in (next(documents) for _ in range(stop))]
    assert first + [(d.text, d.unfit) for d in open_at(stream.position())] == every


def test_columns_name_what_is_read():
    assert Columns().names == ("text",)
    assert Columns(blob="blob_id", score="score").names == ("blob_id", "score")


# ---- filters --------------------------------------------------------------------------------------------------------


def test_filters_leave_out_and_count(home, tmp_path):
    rows = [{"text": "x" * n, "score": n} for n in (1, 5, 6, 9, 10, 30)]
    rows += [{"text": "a line\nb line\n\na line\na line", "score": 20}] + [
        {"text": f"text {i} é"} | {"score": 9} for i in range(20)
    ]
    path = rows_to(tmp_path / "rows.jsonl", rows)
    filters = {"min_characters": 6, "max_characters": 29, "max_repeated_lines": 0.3, "gopher_quality": False}
    corpus = {"path": str(path), "min_score": 2}
    out = prepare(recipe_of(home, tmp_path / "out", corpus, filters=filters))
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    expected = {"max_characters": 1, "max_repeated_lines": 1, "min_characters": 1, "score below 2": 1}
    assert manifest["filtered"] == expected
    assert manifest["filters"] == {"min_characters": 6, "max_characters": 29, "max_repeated_lines": 0.3}
    assert sum(split["documents"] for split in manifest["splits"].values()) == len(rows) - 4


@given(st.lists(st.sampled_from(["a", "b", " a ", "", "  "]), max_size=12))
def test_repeated_lines_by_counting(lines):
    kept = [line.strip() for line in lines if line.strip()]
    repeated = sum(line in kept[:i] for i, line in enumerate(kept))
    assert repeated_lines("\n".join(lines)) == pytest.approx(repeated / len(kept) if kept else 0)


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ({"min_character": 5}, r"no filter `min_character` \(did you mean `min_characters`\?\)"),
        ({"min_characters": 0.5}, "`min_characters` is 0.5, expected a whole number above 0"),
        ({"max_repeated_lines": 1}, "`max_repeated_lines` is 1, expected a share from 0 to below 1"),
        ({"gopher_quality": 3}, "`gopher_quality` is 3, expected true or false"),
        ({"min_characters": 9, "max_characters": 8}, "min_characters is 9 and max_characters 8, expected no less"),
        (["min_characters"], "filters is a list, expected a mapping"),
    ],
)
def test_wrong_filters_are_refused(spec, sentence):
    with pytest.raises(UserError, match=sentence):
        check_filters(spec)


def test_gopher_rules_are_datatroves():
    pytest.importorskip("datatrove")
    pytest.importorskip("spacy")
    fails = make_filter(check_filters({"gopher_repetition": True}))
    assert fails("the same words again and again " * 40) == "gopher_repetition"
    various = " ".join(f"Sentence{i} says thing{i * i} about{i % 17} matter{i % 13}." for i in range(60))
    assert fails(various) is None


def test_without_datatrove_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datatrove.data", None)
    with pytest.raises(
        UserError, match=r'`gopher_quality` is datatrove\'s; install it with `pip install "small-doge\['
    ):
        check_filters({"gopher_quality": True})
