"""The tokenizer: exact round trips, special tokens where they belong and nowhere else, the chat template's mask."""

import hashlib
import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from small_doge.data.corpora import Document, split_of
from small_doge.data.tokenizer import (
    SPECIAL_TOKENS,
    TokenizerRecipe,
    decode_bytes,
    decode_text,
    encode_text,
    load_tokenizer,
    train_tokenizer,
)
from small_doge.errors import UserError

VOCAB_SIZE = 600


def write_corpus(path: Path, count: int = 200) -> list[str]:
    """Documents of words of a made-up language, as JSONL."""
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghijklmnop", k=generator.randint(2, 8))) for _ in range(300)]
    texts = [" ".join(generator.choices(words, k=40)) + f" été {i} 犬\n" for i in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return texts


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = write_corpus(folder / "corpus.jsonl")
    recipe = TokenizerRecipe(
        output_dir=str(folder / "out"),
        corpus=str(folder / "corpus.jsonl"),
        vocab_size=VOCAB_SIZE,
        validation_fraction=0.2,
    )
    return recipe, train_tokenizer(recipe), texts


@pytest.fixture(scope="module")
def tokenizer(trained):
    return load_tokenizer(trained[1])


def test_the_vocabulary_is_exactly_as_large_as_asked_for_and_begins_with_the_special_tokens(tokenizer):
    assert len(tokenizer) == len(tokenizer.get_vocab()) == VOCAB_SIZE
    assert tokenizer.convert_ids_to_tokens(list(range(16))) == list(SPECIAL_TOKENS)
    assert len(set(SPECIAL_TOKENS)) == 16
    assert SPECIAL_TOKENS[:6] == (
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|finetune_right_pad_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|reserved_special_token_0|>",
    )
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    assert tokenizer.model_max_length > 10**9
    assert tokenizer.model_input_names == ["input_ids", "attention_mask"]


# Any string UTF-8 can hold, with the spellings of special tokens strewn in.
TEXTS = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"])),
        st.sampled_from([*SPECIAL_TOKENS, "\r\n", "\x00", " \n ", "é", "e\u0301", "🐕‍🦺", "\ufeff", "12345", "don't"]),
    )
).map("".join)


@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
def test_every_string_round_trips_byte_for_byte_and_holds_no_special_token(tokenizer, text):
    (ids,) = encode_text(tokenizer, [text])
    assert not set(ids) & set(range(16))
    assert decode_text(tokenizer, ids) == text
    assert decode_bytes(tokenizer, ids) == text.encode()
    assert decode_text(tokenizer, [0, *ids, 1, 2, 2]) == text
    assert b"".join(decode_bytes(tokenizer, [i]) for i in ids) == text.encode(), "each token's bytes stand alone"


def test_encoding_takes_no_notice_of_padding_and_truncation_set_elsewhere(trained):
    tokenizer = load_tokenizer(trained[1])
    texts = ["a" * 100, "b"]
    tokenizer(texts, padding=True, truncation=True, max_length=4)
    assert [decode_text(tokenizer, ids) for ids in encode_text(tokenizer, texts)] == texts
    assert tokenizer("<|end_of_text|>")["input_ids"] == [0, 1], "the tokenizer itself still knows its special tokens"


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_calling_the_tokenizer_puts_one_begin_token_in_front_and_none_behind(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == 0
    assert ids.count(0) == 1
    assert ids.count(1) == 0
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids[1:]


def test_digits_stand_in_groups_of_up_to_three_and_no_space_is_put_in_front(tokenizer):
    pieces = [text for text, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("ab 1234567 cd")]
    assert pieces == ["ab", "Ġ", "123", "456", "7", "Ġcd"]


CONTENTS = st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: "<|" not in text)


@settings(deadline=None)
@given(
    turns=st.lists(st.tuples(CONTENTS, CONTENTS), min_size=1, max_size=4),
    system=st.none() | CONTENTS,
)
def test_the_chat_mask_marks_each_answer_with_its_end_token_and_nothing_else(tokenizer, turns, system):
    messages = [{"role": "system", "content": system}] if system is not None else []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    chat = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    ids, mask = chat["input_ids"], chat["assistant_masks"]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered == "<|begin_of_text|>" + "".join(
        f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n{m['content'].strip()}<|end_of_text|>" for m in messages
    )
    assert ids.count(0) == 1
    assert ids[0] == 0
    assert ids.count(1) == len(messages)
    marked: list[list[int]] = []
    for before, here, token in zip([0, *mask], mask, ids, strict=False):
        if here:
            marked = [*marked, []] if not before else marked
            marked[-1].append(token)
    expected = [[*tokenizer(answer.strip(), add_special_tokens=False)["input_ids"], 1] for _, answer in turns]
    assert marked == expected


def test_a_generation_prompt_is_the_conversation_up_to_the_answer(tokenizer):
    messages = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "\n\n def"}]
    whole = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert whole[: len(prompt)] == prompt
    assert tokenizer.decode(whole[len(prompt) :]) == "def<|end_of_text|>"


def test_training_reads_the_train_side_only(trained):
    recipe, folder, texts = trained
    train = [text for text in texts if split_of(Document("", text, ""), recipe.validation_fraction) == "train"]
    record = json.loads((folder / "stage.json").read_text(encoding="utf-8"))
    assert 0 < len(train) < len(texts)
    assert record["documents"] == len(train)
    assert record["bytes"] == sum(len(text.encode()) for text in train)
    validation = [text for text in texts if text not in train]
    ids = encode_text(load_tokenizer(folder), validation)
    per_token = sum(len(text.encode()) for text in validation) / sum(map(len, ids))
    assert record["bytes_per_token"] == pytest.approx(per_token, abs=1e-4)


def test_without_validation_text_it_says_so(trained, tmp_path, capsys):
    options = {"output_dir": str(tmp_path / "out"), "validation_fraction": 0.0}
    folder = train_tokenizer(TokenizerRecipe(**{**vars(trained[0]), **options}))
    assert capsys.readouterr().out.endswith(", no validation text\n")
    assert json.loads((folder / "stage.json").read_text(encoding="utf-8"))["bytes_per_token"] is None


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()


def test_the_same_settings_return_at_once_and_give_the_same_tokenizer_elsewhere(trained, tmp_path, capsys):
    recipe, folder, _ = trained
    before = (folder / "stage.json").stat().st_mtime_ns
    assert train_tokenizer(recipe) == folder
    assert "already there" in capsys.readouterr().out
    assert (folder / "stage.json").stat().st_mtime_ns == before
    again = train_tokenizer(TokenizerRecipe(**{**vars(recipe), "output_dir": str(tmp_path / "again")}))
    assert digest(again) == digest(folder)
    load_tokenizer(folder).save_pretrained(tmp_path / "saved")
    assert digest(tmp_path / "saved") == digest(folder)
    with pytest.raises(UserError, match="`vocab_size` is 600 there and 601 here"):
        train_tokenizer(TokenizerRecipe(**{**vars(recipe), "vocab_size": 601}))


def test_max_bytes_stops_reading(trained, tmp_path):
    recipe, _, texts = trained
    limit = 20_000
    folder = train_tokenizer(
        TokenizerRecipe(**{**vars(recipe), "output_dir": str(tmp_path / "out"), "max_bytes": limit})
    )
    read = json.loads((folder / "stage.json").read_text(encoding="utf-8"))["bytes"]
    assert limit <= read < limit + max(len(text.encode()) for text in texts)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"vocab_size": 271}, "vocab_size is 271, expected at least 272"),
        ({"vocab_size": 60_000}, r"too small for vocab_size 60,000: it reached \d,\d+ entries"),
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0, expected from 0 to below 1"),
        ({"max_bytes": 0}, "max_bytes is 0"),
        ({"min_frequency": 0}, "min_frequency is 0"),
        ({"corpus": "nowhere"}, "`nowhere` is neither"),
    ],
)
def test_mistakes_are_named_and_leave_the_disk_as_it_was(trained, tmp_path, changed, sentence):
    recipe, _, _ = trained
    with pytest.raises(UserError, match=sentence):
        train_tokenizer(TokenizerRecipe(**{**vars(recipe), "output_dir": str(tmp_path / "out"), **changed}))
    assert list(tmp_path.iterdir()) == []


def test_the_smallest_vocabulary_is_bytes_and_special_tokens(trained, tmp_path):
    recipe, _, _ = trained
    smallest = {**vars(recipe), "output_dir": str(tmp_path / "out"), "vocab_size": 272}
    tokenizer = load_tokenizer(train_tokenizer(TokenizerRecipe(**smallest)))
    assert [decode_bytes(tokenizer, [i]) for i in encode_text(tokenizer, ["é"])[0]] == [b"\xc3", b"\xa9"]


def test_loading_what_is_absent_or_broken(trained, tmp_path):
    with pytest.raises(UserError, match=r"holds no tokenizer\.json"):
        load_tokenizer(tmp_path / "absent")
    for file in trained[1].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(tmp_path)
