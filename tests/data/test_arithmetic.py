"""Questions of arithmetic: right, the same for the same seed, and no problem on both sides."""

import json
import re

import pytest

from small_doge import recipe
from small_doge.data.arithmetic import WORDINGS, ArithmeticRecipe, held_out, rows, write_arithmetic
from small_doge.data.conversations import read_conversations
from small_doge.data.verifiable import read_questions
from small_doge.errors import UserError


def _recipe(**options):
    fields = {"output_dir": "-", "train_rows": 3000, "test_rows": 300, "largest": 30, **options}
    return recipe.build(ArithmeticRecipe, fields)


def _asked(side):
    """(operation, a, b) of each row, read back from its words."""
    asked = []
    for row in side:
        question = row["messages"][0]["content"]
        found = [
            (sign, match)
            for sign, wordings in WORDINGS.items()
            for wording in wordings
            if (
                match := re.fullmatch(
                    re.escape(wording).replace(r"\{a\}", r"(\d+)").replace(r"\{b\}", r"(\d+)"), question
                )
            )
        ]
        assert len(found) == 1, question
        sign, match = found[0]
        a, b = (match[1], match[2]) if not question.startswith("Take") else (match[2], match[1])
        asked.append((sign, int(a), int(b)))
    return asked


def test_answers_are_right_and_in_the_messages():
    for side in rows(_recipe()):
        for (sign, a, b), row in zip(_asked(side), side, strict=True):
            assert row["answer"] == (a + b if sign == "+" else a - b) >= 0
            assert row["messages"][1] == {"role": "assistant", "content": str(row["answer"])}


def test_no_problem_is_on_both_sides_whatever_its_wording_or_order():
    train, test = ({frozenset((a, b)) for _, a, b in _asked(side)} for side in rows(_recipe()))
    assert not train & test
    assert len(train) > 300
    assert len(test) > 20


def test_no_question_stands_twice():
    for side in rows(_recipe()):
        questions = [row["messages"][0]["content"] for row in side]
        assert len(set(questions)) == len(questions)


def test_a_seed_says_everything():
    assert rows(_recipe()) == rows(_recipe())
    assert rows(_recipe()) != rows(_recipe(seed=1))


def test_a_larger_range_moves_no_problem():
    small, large = _recipe(), _recipe(largest=99)
    assert all(held_out(a, b, small) == held_out(a, b, large) for a in range(31) for b in range(31))


def test_wrong_answers_are_in_training_messages_alone():
    train, test = rows(_recipe(wrong_fraction=0.5))
    wrong = [row for row in train if row["messages"][1]["content"] != str(row["answer"])]
    assert 0.4 < len(wrong) / len(train) < 0.6
    assert all(abs(int(row["messages"][1]["content"]) - row["answer"]) in (1, 10) for row in wrong)
    assert all(row["messages"][1]["content"] == str(row["answer"]) for row in test)
    assert [row["answer"] for row in train] == [
        a + b if sign == "+" else a - b for sign, a, b in _asked(train)
    ]  # what verifies stays right


def test_both_stages_read_what_is_written(tmp_path):
    folder = write_arithmetic(_recipe(output_dir=str(tmp_path / "q"), operations=["+"]))
    before = (folder / "train.jsonl").stat().st_mtime_ns
    assert write_arithmetic(_recipe(output_dir=str(folder), operations=["+"])) == folder
    assert (folder / "train.jsonl").stat().st_mtime_ns == before
    first = json.loads((folder / "test.jsonl").read_text().splitlines()[0])
    questions, dropped = read_questions(str(folder), "test")
    assert dropped == {}
    assert len(questions) == 300
    assert questions[0]["prompt"] == first["messages"][:1]
    assert questions[0]["answer"] == str(first["answer"])
    assert len(read_conversations(str(folder), "train")[0]) == 3000


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"train_rows": 10**6}, "`train_rows` is 1,000,000, expected at most"),
        ({"test_rows": 0}, "`test_rows` is 0"),
        ({"operations": ["*"]}, "expected \\+, - or both"),
        ({"operations": []}, "expected \\+, - or both"),
        ({"validation_fraction": 0.0}, "`validation_fraction` is 0.0"),
        ({"wrong_fraction": 1.5}, "`wrong_fraction` is 1.5"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(options, match):
    with pytest.raises(UserError, match=match):
        rows(_recipe(**options))
