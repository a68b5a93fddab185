"""Questions about the standard library: what is held out, what is rejected, and that they are the same every time."""

import itertools
import json
import textwrap

import pytest

from small_doge.data import stdlib_chat
from small_doge.data.corpora import Document, split_of
from small_doge.data.stdlib_chat import (
    QuestionsRecipe,
    _documented,
    conversations,
    definitions,
    first_paragraph,
    preferences,
    write_questions,
)
from small_doge.errors import UserError

FRACTIONS = (0.1, 0.03)


@pytest.fixture(scope="module")
def found():
    return definitions(*FRACTIONS)


@pytest.fixture
def some_files(monkeypatch):
    """The standard library cut to some of its files."""
    read = stdlib_chat.stdlib.read

    def some(part, root):
        return itertools.islice(read(part, root), 80 if part == "source" else 0)

    monkeypatch.setattr(stdlib_chat.stdlib, "read", some)


def sides(found):
    return [d for d in found if not d.held_out], [d for d in found if d.held_out]


def test_no_held_out_question_or_docstring_is_in_a_training_row(found):
    train, test = sides(found)
    assert len(train) > 3000
    assert 0.05 * len(found) < len(test) < 0.2 * len(found)
    rows = [*conversations(train), *preferences(train)]
    told = {text.casefold() for row in rows for text in texts(row)}
    for row in [*conversations(test), *preferences(test)]:
        assert not told & {text.casefold() for text in texts(row)}


def texts(row):
    return (
        [row["prompt"], row["chosen"], row["rejected"]] if "prompt" in row else [m["content"] for m in row["messages"]]
    )


def test_files_held_out_from_pretraining_are_held_out_here(found):
    from small_doge.data import stdlib

    documents = stdlib.read("source", stdlib.require_folder())
    held_out = [
        (stdlib_chat._module(path), text)
        for path, text in documents
        if split_of(Document(path, text, ""), FRACTIONS[1]) == "validation"
    ]
    names = {f"{module}.{name}" for module, text in held_out for name, _ in _documented(text)}
    here = [d for d in found if d.name in names]
    assert held_out
    assert here
    assert all(d.held_out for d in here)


def test_a_preference_is_the_right_paragraph_over_that_of_a_sibling(found):
    by_paragraph = {d.paragraph: d for d in found}
    for side in sides(found):
        rows = preferences(side)
        assert len(rows) > 100
        for row in rows:
            right, wrong = by_paragraph[row["chosen"]], by_paragraph[row["rejected"]]
            assert right.name == row["definition"] != wrong.name
            assert f"`{right.name}`" in row["prompt"]
            assert right.module == wrong.module
        # two by two the other way round, so that an answer alone tells nothing
        for one, other in zip(rows[::2], rows[1::2], strict=True):
            assert (one["chosen"], one["rejected"]) == (other["rejected"], other["chosen"])


def test_siblings_meet_again_only_as_others(found):
    train, _ = sides(found)
    once, twice = preferences(train), preferences(train, rounds=2)
    assert twice[: len(once)] == once
    assert 1.8 * len(once) < len(twice) < 2 * len(once)  # a module of two has no others
    met = [frozenset((row["chosen"], row["rejected"])) for row in twice[::2]]
    assert len(set(met)) == len(met)


def test_neighbours_are_of_like_length(found):
    """So that a batch of eight rows holds little padding: half of what it would in the order of names."""
    rows = preferences(sides(found)[0])

    def padding(rows):
        longest = [max(len(row["chosen"]), len(row["rejected"])) for row in rows]
        return sum(8 * max(longest[i : i + 8]) for i in range(0, len(rows), 8)) / sum(longest) - 1

    assert padding(rows) < 0.5 * padding(sorted(rows, key=lambda row: row["definition"]))


def test_one_name_and_one_paragraph_stand_once(found):
    assert len({d.name for d in found}) == len(found)
    assert len({d.paragraph for d in found}) == len(found)


def test_the_same_python_writes_the_same_files(tmp_path, capsys, some_files):
    for name in ("one", "two"):
        write_questions(QuestionsRecipe(str(tmp_path / name)))
    for path in (tmp_path / "one").rglob("*.jsonl"):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()
    row = json.loads((tmp_path / "one/conversations/test.jsonl").read_text(encoding="utf-8").split("\n")[0])
    assert [m["role"] for m in row["messages"]] == ["user", "assistant"]
    capsys.readouterr()
    write_questions(QuestionsRecipe(str(tmp_path / "one")))
    assert "already" in capsys.readouterr().out
    with pytest.raises(UserError, match="different run"):
        write_questions(QuestionsRecipe(str(tmp_path / "one"), validation_fraction=0.2))


def test_a_side_without_definitions_is_one_sentence(tmp_path, some_files):
    with pytest.raises(UserError, match="change `validation_fraction`"):
        write_questions(QuestionsRecipe(str(tmp_path / "none"), 0.0, 0.0))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_a_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(ValueError, match="`validation_fraction` is"):
        QuestionsRecipe("x", validation_fraction=fraction)


def test_what_counts_as_a_documented_definition():
    source = '''
    def plain(a):
        """Give back what   was
        given, unchanged.

        And more.
        """

    def _private():
        """Nobody asks about this one."""

    def short():
        """Tiny."""

    class Thing:
        """A thing that holds some other things."""

        async def method(self):
            """Do what a method has to do."""

    def cut(x, y=<unrepresentable>):
        """A signature that C does not tell."""

    def dots(...):
        """No signature of its own at all."""
    '''
    assert dict(_documented(textwrap.dedent(source))) == {
        "plain": "Give back what was given, unchanged.",
        "Thing": "A thing that holds some other things.",
        "Thing.method": "Do what a method has to do.",
        "cut": "A signature that C does not tell.",
        "dots": "No signature of its own at all.",
    }
    assert dict(_documented("def broken(:")) == {}


@pytest.mark.parametrize("docstring", ["", "  \n", "f(x) -> int", ">>> f(1)", "-----", "word"])
def test_what_is_no_sentence_is_no_answer(docstring):
    assert first_paragraph(docstring) == ""
