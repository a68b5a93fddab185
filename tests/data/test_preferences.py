"""Preferences: every shape read alike, the loss on replies alone, and pairs that teach nothing dropped and counted."""

import itertools
import json
from pathlib import Path

import datasets
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from small_doge.data.preferences import encode_preferences, read_preferences
from small_doge.data.rendering import Renderer
from small_doge.data.tokenizer import SPECIAL_TOKENS, TokenizerRecipe, encode_text, load_tokenizer, train_tokenizer
from small_doge.errors import UserError

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "dpo"
BOS, EOS = 0, 1


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Rows kept here and not in the home of whoever runs the tests."""
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("preferences")


@pytest.fixture(scope="module")
def tokenizer(folder):
    texts = [f"What is {a} and {b}? It is {a + b}, I am sure.\n\nthe {a}th été 犬" for a in range(9) for b in range(30)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    recipe = TokenizerRecipe(str(folder / "tokenizer"), str(folder / "corpus.jsonl"), 320, validation_fraction=0.1)
    return load_tokenizer(train_tokenizer(recipe))


_numbers = itertools.count()


def write(folder: Path, rows: list) -> str:
    path = folder / f"{next(_numbers)}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def chat(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    roles = itertools.cycle(["user", "assistant"])
    return messages + [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


def reply(content: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": content}]


def transcript(messages: list[dict[str, str]]) -> str:
    names = {"system": "System", "user": "Human", "assistant": "Assistant"}
    return "".join(f"\n\n{names[m['role']]}: {m['content']}" for m in messages)


# Any text that says something and begins and ends with a letter or sign, as a transcript cannot hold blanks there.
CONTENTS = (
    st.lists(
        st.one_of(
            st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
            st.sampled_from([*SPECIAL_TOKENS[:6], "\n\n", " ", "\U000f0000", "12345"]),
        ),
        max_size=5,
    )
    .map(lambda parts: "".join(parts).strip())
    .filter(bool)
)
PAIRS = st.builds(
    lambda pairs, question, system, chosen, rejected: (
        chat(*itertools.chain.from_iterable(pairs), question, system=system),
        chosen,
        rejected,
    ),
    st.lists(st.tuples(CONTENTS, CONTENTS), max_size=3),
    CONTENTS,
    st.none() | CONTENTS,
    CONTENTS,
    CONTENTS,
).filter(lambda pair: pair[1] != pair[2])


def in_shape(shape: str, prompt: list[dict[str, str]], chosen: str, rejected: str) -> dict:
    """A row of ``shape``; transcripts hold no system message, and text but one message of the user."""
    both = {"chosen": chosen, "rejected": rejected}
    whole = {side: prompt + reply(text) for side, text in both.items()}
    if shape == "ultrafeedback":
        said = next(m["content"] for m in prompt if m["role"] == "user")
        return {"prompt": said, "score_chosen": 8.5, "score_rejected": 3.0, **whole}
    if shape == "transcripts":
        return {side: transcript(messages) for side, messages in whole.items()}
    return {
        "message lists": {"prompt": prompt, "chosen": reply(chosen), "rejected": reply(rejected)},
        "message lists that repeat the prompt": {"prompt": prompt, **whole},
        "list and text": {"prompt": prompt, **both},
        "whole conversations": whole,
        "transcript and replies": {"prompt": f"{transcript(prompt)}\n\nAssistant:", **both},
        "text": {"prompt": prompt[-1]["content"], **both},
    }[shape]


SHAPES = st.sampled_from(
    [
        "ultrafeedback",
        "message lists",
        "message lists that repeat the prompt",
        "list and text",
        "whole conversations",
        "transcripts",
        "transcript and replies",
        "text",
    ]
)


@settings(max_examples=80, deadline=None)
@given(shape=SHAPES, pairs=st.lists(PAIRS, min_size=1, max_size=4))
def test_prompt_and_reply_are_the_whole_conversation_and_the_reply_is_the_reply_alone(tokenizer, folder, shape, pairs):
    if shape in ("transcripts", "transcript and replies"):
        pairs = [([m for m in prompt if m["role"] != "system"], *sides) for prompt, *sides in pairs]
    elif shape == "text":
        pairs = [(prompt[-1:], *sides) for prompt, *sides in pairs]
    read, counts = read_preferences(write(folder, [in_shape(shape, *pair) for pair in pairs]))
    assert counts == {}
    assert read.column_names == ["prompt", "chosen", "rejected", "source"]
    assert [tuple(row[c] for c in read.column_names[:3]) for row in read] == [
        (prompt, reply(chosen), reply(rejected)) for prompt, chosen, rejected in pairs
    ]
    encoded, counts = encode_preferences(read, tokenizer, 100_000)
    assert counts == {}
    renderer = Renderer(tokenizer)
    for (prompt, *sides), row in zip(pairs, encoded, strict=True):
        for text, ids in zip(sides, (row["chosen_ids"], row["rejected_ids"]), strict=True):
            assert ids == [*encode_text(tokenizer, [text])[0], EOS]
            (whole,) = renderer.encode([prompt + reply(text)])
            assert row["prompt_ids"] + ids == whole.input_ids
            assert BOS not in ids
        assert row["prompt_ids"].count(BOS) == 1
        assert row["prompt_ids"].count(EOS) == len(prompt)


def test_it_is_apply_chat_template(tokenizer, folder):
    prompt = chat("Hi", "Hello.", "How?", system="Be brief.")
    row = {"prompt": prompt, "chosen": "Well.", "rejected": "Badly."}
    encoded, _ = encode_preferences(read_preferences(write(folder, [row]))[0], tokenizer, 500)
    whole = tokenizer.apply_chat_template(prompt + reply("Well."), return_dict=True)["input_ids"]
    asked = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert encoded[0]["prompt_ids"] == asked
    assert encoded[0]["prompt_ids"] + encoded[0]["chosen_ids"] == whole


def pair(**changes) -> dict:
    return {"prompt": "a", "chosen": chat("a", "b"), "rejected": chat("a", "c")} | changes


GOOD = pair()
BAD = {
    "its prompts differ": pair(chosen=chat("a", "x", "a", "b"), rejected=chat("a", "y", "a", "c")),
    "a prompt that its messages do not hold": pair(prompt="other"),
    "its replies are the same": pair(rejected=chat("a", " b\n")),
    "an empty reply": pair(rejected=chat("a", " ")),
    "a tie: its scores are equal": pair(score_chosen=3, score_rejected=3.0),
    "the rejected reply has the higher score": pair(score_chosen=3, score_rejected=4),
    "no prompt": pair(prompt=None),
    "no reply, as text or a list of messages": pair(chosen=[]),
    "a reply that is not the assistant's": pair(chosen=chat("a", "b", "c")),
    "a content that is not text": pair(chosen=[*chat("a"), *reply(3)]),
    "a content that is not Unicode text": pair(chosen=chat("a", "\ud800")),
    "a role other than system, user and assistant": pair(chosen=[*chat("a"), {"role": "tool", "content": "b"}]),
    "a message that is not a mapping": pair(chosen=["a", "b"]),
    "an empty message": pair(prompt=" ", chosen="a", rejected="b"),
    "it begins with the assistant": pair(prompt=[*reply("x"), *chat("a")], chosen="a", rejected="b"),
    "its prompt does not end with the user": pair(prompt=chat("a", "b"), chosen="a", rejected="b"),
    "two messages of the user in a row": pair(prompt=chat("a") * 2, chosen="a", rejected="b"),
}


@pytest.mark.parametrize("reason", BAD)
def test_an_unfit_pair_is_dropped_and_counted(folder, reason):
    read, counts = read_preferences(write(folder, [GOOD, BAD[reason], GOOD]))
    assert counts == {f"dropped: {reason}": 1}
    assert [row["rejected"] for row in read] == [reply("c")] * 2
    with pytest.raises(UserError, match="has no row to train on, of 1: "):
        read_preferences(write(folder, [BAD[reason]]))


HH = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (f"{HH} d", f"{HH} d ", "its replies are the same"),
        (f"{HH} d", HH, "an empty reply"),
        (f"{HH} d", "\n\nHuman: a\n\nAssistant: d", "its prompts differ"),
        (f"{HH} d\n\nHuman: e", f"{HH} e", "a reply that is not the assistant's"),
        ("once upon a time", f"{HH} e", "a transcript that does not begin with Human: or Assistant:"),
        (
            "\n\nHuman: a\n\nHuman: b\n\nAssistant: c",
            "\n\nHuman: a\n\nHuman: b\n\nAssistant: d",
            "two messages of the user",
        ),
        ("\n\nAssistant: c", "\n\nAssistant: d", "its prompt does not end with the user"),
    ],
)
def test_an_unfit_transcript_is_dropped_and_counted(folder, chosen, rejected, reason):
    rows = [{"chosen": f"{HH} d", "rejected": f"{HH} e"}, {"chosen": chosen, "rejected": rejected}]
    read, counts = read_preferences(write(folder, rows))
    (told,) = counts
    assert told.startswith(f"dropped: {reason}")
    assert read[0]["prompt"] == chat("a", "b", "c")


def test_scores_that_are_none_or_clear_are_no_tie(folder):
    rows = [pair(score_chosen=None, score_rejected=None), pair(score_chosen=1.0, score_rejected=0)]
    assert read_preferences(write(folder, [*rows, GOOD]))[1] == {}


def test_a_plain_reply_may_speak_of_humans(folder):
    row = {"prompt": "Human: what is that?", "chosen": "Human: a species.", "rejected": "Assistant: an app."}
    read, _ = read_preferences(write(folder, [row]))
    assert read[0]["prompt"] == chat("Human: what is that?")
    assert read[0]["chosen"] == reply("Human: a species.")
    assert read[0]["rejected"] == reply("Assistant: an app.")


def test_a_blank_system_message_is_cut_and_counted(folder):
    read, counts = read_preferences(
        write(folder, [pair(chosen=chat("a", "b", system=""), rejected=chat("a", "c", system=""))])
    )
    assert read[0]["prompt"] == chat("a")
    assert counts == {"cut: an empty system message": 1}


@settings(max_examples=40, deadline=None)
@given(pair=PAIRS, max_length=st.integers(20, 150))
def test_a_long_prompt_loses_its_oldest_exchanges_and_a_reply_nothing(tokenizer, pair, max_length):
    prompt, chosen, rejected = pair
    dataset = datasets.Dataset.from_list([{"prompt": prompt, "chosen": reply(chosen), "rejected": reply(rejected)}])
    first = 1 if prompt[0]["role"] == "system" else 0
    shorter = [prompt[:first] + prompt[start:] for start in range(first, len(prompt), 2)]
    sides = [[*ids, EOS] for ids in encode_text(tokenizer, [chosen, rejected])]
    assume(sides[0] != sides[1])
    room = max_length - max(map(len, sides))
    fitting = [ids for ids in Renderer(tokenizer).prompts(shorter) if len(ids) <= room]
    if not fitting:
        with pytest.raises(UserError, match="of 1: its last exchange exceeds max_length"):
            encode_preferences(dataset, tokenizer, max_length)
        return
    encoded, counts = encode_preferences(dataset, tokenizer, max_length)
    assert encoded[0] == {"prompt_ids": fitting[0], "chosen_ids": sides[0], "rejected_ids": sides[1]}
    cut = {"cut: exchanges of the prompt beyond max_length": 1}
    assert counts == ({} if len(fitting) == len(shorter) else cut)


def test_max_length_may_be_filled_to_the_last_token(tokenizer):
    dataset = datasets.Dataset.from_list(
        [{"prompt": chat("a", "b", "c"), "chosen": reply("x"), "rejected": reply("yyy")}]
    )
    whole, _ = encode_preferences(dataset, tokenizer, 1000)
    length = len(whole[0]["prompt_ids"]) + len(whole[0]["rejected_ids"])
    assert len(whole[0]["rejected_ids"]) > len(whole[0]["chosen_ids"])
    assert encode_preferences(dataset, tokenizer, length)[1] == {}
    assert encode_preferences(dataset, tokenizer, length - 1)[1] == {
        "cut: exchanges of the prompt beyond max_length": 1
    }


def test_a_template_whose_prompt_is_no_beginning_is_named(tokenizer, folder):
    other = load_tokenizer(tokenizer.name_or_path)
    other.chat_template = other.chat_template.replace(
        "assistant<|end_header_id|>\\n\\n' }}", "assistant<|end_header_id|>' }}"
    )
    read, _ = read_preferences(write(folder, [GOOD]))
    with pytest.raises(UserError, match="ends a prompt for generation in .* expected what stands before a reply"):
        encode_preferences(read, other, 100)
    other.chat_template = None
    with pytest.raises(UserError, match="has no chat template"):
        encode_preferences(read, other, 100)
    with pytest.raises(UserError, match="max_length is 0"):
        encode_preferences(read, tokenizer, 0)


def test_weights_and_mistakes_are_as_for_conversations(folder):
    paths = [write(folder, [pair(chosen=chat("a", f"{name}{i}")) for i in range(20)]) for name in "xy"]
    mixed, counts = read_preferences([{"path": paths[0], "weight": 3}, {"path": paths[1], "weight": 1}])
    found = [row["chosen"][0]["content"] for row in mixed]
    assert [sum(f[0] == name for f in found) for name in "xy"] == [20, 6]
    assert counts == {"dropped: beyond the weight of its source": 14}
    with pytest.raises(UserError, match="has the columns text, which are no preferences known here"):
        read_preferences(write(folder, [{"text": "a"}]))
    with pytest.raises(UserError, match="names no source, expected `path` or `dataset`$"):
        read_preferences({"weight": 1})
    with pytest.raises(UserError, match="unknown field `identity`"):
        read_preferences({"identity": "who.yaml"})


@pytest.mark.skipif(not REAL.is_dir(), reason="shared/data/dpo is not there")
def test_real_preferences_are_all_fit(tokenizer):
    read, counts = read_preferences(str(REAL), "test")
    assert (len(read), counts) == (500, {})
    encoded, counts = encode_preferences(read, tokenizer, 1024)
    dropped = counts.pop("dropped: its last exchange exceeds max_length", 0)
    assert len(encoded) == 500 - dropped
    assert set(counts) <= {"cut: exchanges of the prompt beyond max_length"}
    for row in encoded:
        assert len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) <= 1024
        assert (row["chosen_ids"].index(EOS), row["rejected_ids"].index(EOS)) == (
            len(row["chosen_ids"]) - 1,
            len(row["rejected_ids"]) - 1,
        )
