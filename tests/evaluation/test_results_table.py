"""What the table says of a score: its error, its interval, whether guessing would do as well."""

import math

import pytest

from small_doge.evaluation.results_table import add_verdict, cell, interval, markdown, table_rows


def score(value, documents, chance=0.25, stderr=0.01):
    metrics = {"acc": value, "acc_stderr": stderr}
    return {"metric": "acc", "metrics": metrics, "chance": chance, "documents": documents}


def results(name, **values):
    scores = {
        task: add_verdict(
            score(*known) | {"num_fewshot": 5, "truncated": 0, "requests": 4, "notes": []},
        )
        for task, known in values.items()
    }
    settings = {"suite": "doge-base", "num_fewshot": 5, "limit": None}
    facts = {"suite": "doge-base", "limit": None, "context_length": 2048, "notes": [], "versions": {}}
    return {"name": name, "scores": scores, "settings": settings, **facts}


def test_the_interval_is_1_96_standard_errors_for_many_and_honest_for_few():
    error = math.sqrt(0.3 * 0.7 / 100_000)
    assert interval(0.3, 100_000) == pytest.approx((0.3 - 1.96 * error, 0.3 + 1.96 * error), abs=2e-5)
    low, high = interval(0.0, 5)
    assert (low, high) == pytest.approx((0, 1.96**2 / (5 + 1.96**2)))
    assert interval(1.0, 5) == pytest.approx((1 - high, 1))
    # Wilson's interval is where a test of the share p itself does not reject the score.
    for end in interval(0.4, 50):
        assert abs(0.4 - end) == pytest.approx(1.96 * math.sqrt(end * (1 - end) / 50))


@pytest.mark.parametrize(
    ("value", "documents", "chance", "at_chance"),
    [
        (0.26, 1000, 0.25, True),
        (0.30, 1000, 0.25, False),
        (0.20, 1000, 0.25, False),  # worse than guessing is not guessing
        (0.0, 5, 0.25, True),
        (1.0, 3, 0.25, False),
        (0.0, 2900, 0.0, True),
        (0.001, 2900, 0.0, False),
        (0.5, 100, None, None),
    ],
)
def test_a_score_whose_interval_contains_chance_says_so(value, documents, chance, at_chance):
    verdict = add_verdict(score(value, documents, chance))
    assert verdict["at_chance"] is at_chance
    assert cell(verdict) == f"{100 * value:.2f} ± 1.00" + (" (chance)" if at_chance else "")
    assert cell(add_verdict(score(value, documents, chance, stderr=None))).startswith(f"{100 * value:.2f}")


def test_rows_of_other_folders_stand_beside_and_differences_are_said():
    mine = results("mine", mmlu=(0.3, 1000), piqa=(0.6, 500, 0.5))
    other = results("other | one", mmlu=(0.26, 1000))
    other["settings"]["num_fewshot"] = 0
    rows = table_rows(mine, [other])
    assert [row[0] for row in rows] == [
        "", "mine", "other | one, 0-shot", "random guess", "Doge-20M, published", "Doge-60M, published"
    ]  # fmt: skip
    assert rows[2] == ["other | one, 0-shot", "26.00 ± 1.00 (chance)", ""]
    assert rows[3] == ["random guess", "25.00", "50.00"]
    assert rows[4] == ["Doge-20M, published", "25.43", "58.38"]
    table = markdown(mine, [other])
    assert "| other \\| one, 0-shot | 26.00 ± 1.00 (chance) |  |" in table
    assert "No request was longer than the model reads." in table
    mine["scores"]["piqa"]["truncated"] = 3
    assert "2,048 tokens lost their start: PIQA 3 of 4." in markdown(mine, [])


def test_speed_is_a_column_where_it_was_measured():
    mine, other = results("mine", piqa=(0.6, 500, 0.5)), results("other", piqa=(0.5, 500, 0.5))
    best = {"tokens_per_second": 1234.5, "precision": "int8", "threads": 2, "context": 64}
    mine["speed"] = {"cpu": "a CPU", "best": best}
    assert [row[-1] for row in table_rows(mine, [other])] == ["tokens/s on a CPU", "1,234", "", "", "142", "62"]
    said = "Tokens/s of one reply after 64 tokens, int8 weights, 2 threads, a CPU (`doge bench`)"
    assert said in markdown(mine, [])
