"""Associative recall: what the rows promise, what the measure says of models whose answers are known, and a run."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from small_doge import cli
from small_doge.errors import UserError
from small_doge.evaluation import recall as recall_stage
from small_doge.evaluation.recall import RecallRecipe, build, evaluate_recall, recall, train, training_tasks
from small_doge.evaluation.recall_task import IGNORED, PADDING, measure, most_pairs, recall_rows, tasks


@st.composite
def shapes(draw):
    """Arguments of recall_rows: odd and even lengths and vocabularies, from one pair to as many as fit."""
    length, vocab_size = draw(st.integers(4, 90)), draw(st.integers(4, 300))
    pairs = draw(st.integers(1, most_pairs(length, vocab_size)))
    options = {"vocab_size": vocab_size, "power_a": draw(st.sampled_from([0.01, 0.5, 1.0, 3.0]))}
    options |= {
        "filler": draw(st.sampled_from(["random", "padding"])),
        "split": draw(st.sampled_from(["train", "test"])),
    }
    return (draw(st.integers(1, 5)), length, pairs, draw(st.integers(0, 2**40))), options


@settings(deadline=None, max_examples=150)
@given(shapes())
def test_rows_are_what_they_promise(shape):
    (rows, length, pairs, seed), options = shape
    input_ids, labels = recall_rows(rows, length, pairs, seed, **options)
    assert input_ids.shape == labels.shape == (rows, length)
    assert input_ids.dtype == labels.dtype == np.int64
    half = options["vocab_size"] // 2
    for ids, wanted in zip(input_ids.tolist(), labels.tolist(), strict=True):
        keys, values = ids[0 : 2 * pairs : 2], ids[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert all(0 < key < half for key in keys)
        assert all(half <= value < options["vocab_size"] for value in values)
        labelled = [t for t in range(length) if wanted[t] != IGNORED]
        queries = [t - 1 for t in labelled]
        assert min(queries) >= 2 * pairs
        assert all(t % 2 == 0 for t in queries)
        # Each key is asked for once, and its label is its value.
        assert sorted(ids[t] for t in queries) == sorted(keys)
        value_of = dict(zip(keys, values, strict=True))
        assert [wanted[t] for t in labelled] == [value_of[ids[t]] for t in queries]
        rest = {ids[t] for t in range(2 * pairs, length) if t not in queries}
        if options["filler"] == "padding":
            assert rest <= {PADDING}
        else:
            assert rest.isdisjoint({PADDING, *keys, *values})
            assert all(token < options["vocab_size"] for token in rest)


@settings(deadline=None, max_examples=30)
@given(shapes())
def test_the_same_arguments_give_the_same_rows(shape):
    (rows, length, pairs, seed), options = shape
    first, second = (recall_rows(rows, length, pairs, seed, **options) for _ in range(2))
    assert np.array_equal(first.input_ids, second.input_ids)
    assert np.array_equal(first.labels, second.labels)


def test_seeds_splits_and_batches_differ():
    drawn = [
        recall_rows(300, 64, 16, seed, vocab_size=64, split=split, index=index).input_ids
        for seed in (0, 1)
        for split in ("train", "test")
        for index in (0, 1)
    ]
    assert len({row.tobytes() for ids in drawn for row in ids}) == 8 * 300


@pytest.mark.parametrize("power_a", [0.01, 0.5, 1.0])
def test_gaps_follow_the_power_law(power_a):
    rows, length = 40_000, 42
    _, labels = recall_rows(rows, length, 1, 5, vocab_size=64, power_a=power_a)
    gaps = (np.nonzero(labels != IGNORED)[1] - 1 - 2) // 2
    weights = np.arange(1, 21) ** (power_a - 1)
    expected = weights / weights.sum()
    found = np.bincount(gaps, minlength=20) / rows
    assert len(found) == 20
    # Five standard errors: a wrong exponent (0.5 for 0.01) is off by 80 of them at the first gap.
    assert np.all(np.abs(found - expected) < 5 * np.sqrt(expected / rows))


def test_earlier_draws_take_the_better_gaps():
    """Without replacement, in order: the first key's mean gap is the smallest, as one draw's would be."""
    input_ids, _ = recall_rows(20_000, 64, 8, 5, vocab_size=200)
    query = np.argmax((input_ids[:, 16:] == input_ids[:, :1]), axis=1) // 2
    weights = np.arange(1, 25) ** (0.01 - 1)
    assert query.mean() == pytest.approx((weights * np.arange(24)).sum() / weights.sum(), abs=0.25)
    last = np.argmax((input_ids[:, 16:] == input_ids[:, 14:15]), axis=1) // 2
    assert last.mean() > query.mean() + 2


@pytest.mark.parametrize(("pairs", "vocab_size"), [(3, 4096), (15, 64), (2, 20)])
def test_every_key_and_value_is_as_likely_in_every_place(pairs, vocab_size):
    """Both ways of drawing tokens; sorting by place would show as a correlation of a key with its value."""
    rows, half = 20_000, vocab_size // 2
    input_ids, _ = recall_rows(rows, 4 * pairs, pairs, 7, vocab_size=vocab_size)
    keys, values = input_ids[:, 0 : 2 * pairs : 2], input_ids[:, 1 : 2 * pairs : 2]
    for drawn, low, high in ((keys, 1, half - 1), (values, half, vocab_size - 1)):
        spread = np.sqrt(((high - low + 1) ** 2 - 1) / 12)
        assert np.all(np.abs(drawn.mean(0) - (low + high) / 2) < 5 * spread / rows**0.5)
        assert drawn.min() <= low + vocab_size // 100
        assert drawn.max() >= high - vocab_size // 100
    for i in range(pairs):
        assert abs(np.corrcoef(keys[:, i], values[:, i])[0, 1]) < 5 / rows**0.5


class Known(nn.Module):
    """A model whose hidden states are its logits, from a function of one row: ids (T,) to logits (T, vocab)."""

    def __init__(self, vocab_size, answer):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocab_size)
        self.unused = nn.Parameter(torch.zeros(()))
        self.answer = answer

    @property
    def base_model(self):
        return lambda input_ids, use_cache: SimpleNamespace(
            last_hidden_state=torch.stack([self.answer(row) for row in input_ids])
        )

    def get_output_embeddings(self):
        return nn.Identity()


def look_up(window):
    """After a token, what followed it first, if that is less than ``window`` positions back; else token 0."""

    def answer(ids):
        logits = torch.zeros(len(ids), 64)
        for t, token in enumerate(ids.tolist()):
            first = ids.tolist().index(token)
            logits[t, ids[first + 1] if t > first and t - first - 1 < window else 0] = 10
        return logits

    return answer


def test_one_that_looks_up_is_always_right():
    for pairs in (1, 5, 16):
        found = measure(Known(64, look_up(64)), 64, pairs, 3, rows=20, vocab_size=64, tokens_per_batch=300)
        assert found["accuracy"] == 1.0
        assert found["standard_error"] == 0.0
        assert found["queries"] == 20 * pairs
        assert found["loss"] < 0.01
        assert sum(part["queries"] for part in found["by_distance"]) == 20 * pairs


def test_accuracy_by_distance_shows_a_window():
    found = measure(Known(64, look_up(24)), 64, 12, 3, rows=40, vocab_size=64)
    assert {part["to"] <= 24 for part in found["by_distance"]} == {True, False}
    for part in found["by_distance"]:  # edges of the parts are multiples of 8, as is the window
        assert part["accuracy"] == (1.0 if part["to"] <= 24 else 0.0)


def test_guesses_are_right_by_chance():
    torch.manual_seed(0)
    anything = measure(Known(64, lambda ids: torch.rand(len(ids), 64)), 64, 16, 3, rows=300, vocab_size=64)
    assert anything["accuracy"] == pytest.approx(1 / 64, abs=5 * (1 / 64 / 4800) ** 0.5)
    assert anything["standard_error"] == pytest.approx((1 / 64 / 4800) ** 0.5, rel=0.3)

    def one_of_the_row(ids):
        logits = torch.zeros(len(ids), 64)
        logits[:, ids[1:32:2]] = torch.rand(len(ids), 16)
        return logits

    assert measure(Known(64, one_of_the_row), 64, 16, 3, rows=100, vocab_size=64)["accuracy"] == pytest.approx(
        1 / 16, abs=5 * (1 / 16 / 1600) ** 0.5
    )


def small(folder, **changed):
    """A recipe of seconds."""
    options = {"vocab_size": 64, "lengths": [64], "pairs": [16], "steps": 250, "tokens_per_step": 1024}
    options |= {"measurements": 2, "test_rows": 40, "hidden_size": 64}
    return RecallRecipe(str(folder), **{**options, **changed})


@pytest.mark.slow
def test_a_small_doge_learns(tmp_path):
    path = recall(small(tmp_path / "doge", train_lengths=[16, 32, 64], train_pairs=[0.125, 0.25]))
    (row,) = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert row["accuracy"] > 0.5  # a value of the row at random: 0.0625


def test_a_run_leaves_its_figures_and_its_folder_measures_the_same(tmp_path, capsys):
    learnt = {"train_lengths": [16, 32, 64], "train_pairs": [0.125, 0.25], "steps": 30}
    path = recall(small(tmp_path / "doge", **learnt))
    results = json.loads(path.read_text(encoding="utf-8"))
    (row,) = results["rows"]
    assert (row["length"], row["pairs"], row["queries"], row["step"]) == (64, 16, 640, 30)
    assert [entry["step"] for entry in results["history"]] == [10, 20]
    assert (results["model_type"], results["keep_window_size"]) == ("doge", 64)
    with open(tmp_path / "doge" / "recall.csv", encoding="utf-8", newline="") as file:
        (line,) = csv.DictReader(file)
    assert float(line["accuracy"]) == row["accuracy"]
    assert line["seed"] == "233"
    assert (tmp_path / "doge" / "recall.png").read_bytes().startswith(b"\x89PNG")
    assert "wrote" in capsys.readouterr().out

    (again,) = evaluate_recall(tmp_path / "doge", [64], [0.25], 233, rows=40, tokens_per_batch=100)
    assert again["accuracy"] == row["accuracy"]
    (other,) = evaluate_recall(tmp_path / "doge", [64], [0.25], 234, rows=40)
    assert other["loss"] != row["loss"]

    words = ["recall", str(tmp_path / "doge"), "--lengths", "[32]", "--pairs", "[4]", "--test_rows", "20"]
    assert cli.main([*words, "--output_dir", str(tmp_path / "measured")]) == 0
    measured = json.loads((tmp_path / "measured" / "results.json").read_text(encoding="utf-8"))
    assert measured["rows"][0]["queries"] == 80
    assert measured["history"] == []
    assert not (tmp_path / "measured" / "model.safetensors").exists()

    before = path.stat().st_mtime_ns
    assert recall(small(tmp_path / "doge", **learnt, measurements=1)) == path  # watched otherwise, but the same run
    assert path.stat().st_mtime_ns == before
    with pytest.raises(UserError, match="`seed` is 233 there"):
        recall(small(tmp_path / "doge", **learnt, seed=1))


def test_a_seed_gives_the_same_losses_and_llama_is_as_large(tmp_path):
    recipe = small(tmp_path, steps=3, keep_window_size=16, local_window=4, score_lifetime=50.0)
    losses = [[loss.item() for _, loss in train(build(recipe), recipe)] for _ in range(2)]
    assert losses[0] == losses[1]
    doge, llama = build(recipe), build(small(tmp_path, model="llama"))
    config = doge.config
    assert (config.keep_window_size, config.local_window, config.score_lifetime) == (16, 4, 50)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (doge, llama)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02)
    llama.save_pretrained(tmp_path / "llama")
    (found,) = evaluate_recall(tmp_path / "llama", [16], [4], rows=10)
    assert found["accuracy"] < 0.3


def test_the_loss_is_the_models_own(tmp_path):
    """Shifted as transformers shifts: the head at the queries alone gives the loss of the whole model."""
    recipe = small(tmp_path, steps=1, curriculum=False)
    model = build(recipe)
    rows = recall_rows(1024 // 64, 64, 16, 233, vocab_size=64, split="train", index=0)
    expected = model(input_ids=torch.from_numpy(rows.input_ids), labels=torch.from_numpy(rows.labels)).loss.item()
    ((_, loss),) = train(model, recipe)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_what_is_learnt_grows_to_what_is_measured():
    recipe = small("x", lengths=[64, 128], pairs=[0.125])
    assert training_tasks(recipe, 64) == [(16, 2), (32, 4), (64, 8), (128, 16)]
    assert training_tasks(small("x", curriculum=False), 64) == [(64, 16)]
    assert training_tasks(small("x", train_lengths=[32, 64], pairs=[8]), 64) == [(32, 8), (64, 8)]
    assert tasks([64, 32], [0.25, 8], 64) == [(32, 8), (64, 8), (64, 16)]


def test_an_interrupted_run_keeps_what_was_measured(tmp_path, monkeypatch, capsys):
    def stopped(*arguments, steps):
        for step in range(1, steps + 1):
            yield step, torch.zeros(())
        raise KeyboardInterrupt

    out = tmp_path / "out"
    recipe = small(out, steps=8, measurements=1)
    monkeypatch.setattr(recall_stage, "train", lambda *a: stopped(*a, steps=3))  # before anything is measured
    with pytest.raises(KeyboardInterrupt):
        recall(recipe)
    assert not out.exists()
    monkeypatch.setattr(recall_stage, "train", lambda *a: stopped(*a, steps=5))
    with pytest.raises(KeyboardInterrupt):
        recall(recipe)
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert [row["step"] for row in results["rows"]] == [4]
    assert "interrupted at step 5" in capsys.readouterr().out
    with pytest.raises(UserError, match="`interrupted_at` is 5 there and None here"):
        recall(recipe)
    assert not list(tmp_path.glob(".*"))


MISTAKES = {
    "too many for the length": (["--lengths", "[64]", "--pairs", "[17]"], "17 pairs do not fit a length of 64"),
    "what fits": (["--lengths", "[64]", "--pairs", "[17]"], "expected 1 to 16"),
    "too large a share": (["--lengths", "[64]", "--pairs", "[0.5]"], "32 (0.5 of the length) pairs do not fit"),
    "too many for the vocabulary": (["--vocab_size", "20", "--pairs", "[32]"], "expected 1 to 9"),
    "too many to learn": (["--train_lengths", "[8]", "--pairs", "[8]"], "8 pairs do not fit a length of 8"),
    "no length": (["--lengths", "[]"], "`lengths` is [], expected a list of whole numbers of at least 4"),
    "half a length": (["--lengths", "[64.5]"], "`lengths` is [64.5]"),
    "words": (["--pairs", "[many]"], "`pairs` is ['many'], expected a list of whole numbers, or shares"),
    "half a pair": (["--pairs", "[2.5]"], "`pairs` is [2.5]"),
    "no such model": (["--model", "nowhere"], "model nowhere is neither doge nor llama nor a folder"),
    "heads": (["--num_attention_heads", "3"], "hidden_size 64 is not a multiple of num_attention_heads 3"),
    "window of llama": (["--model", "llama", "--keep_window_size", "8"], "are Doge's"),
    "filler": (["--filler", "noise"], "expected one of 'random', 'padding'"),
    "taken": (["--output_dir", "taken"], "taken holds files that are not of this run"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence(mistake, tmp_path, monkeypatch, capsys):
    words, said = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    assert cli.main(["recall", "--output_dir", "out", "--steps", "1", *words]) == 1
    error = capsys.readouterr().err.strip()
    assert said in error
    assert len(error.splitlines()) == 1
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["mine.txt", "taken"]


def test_a_vocabulary_larger_than_the_models_is_a_mistake():
    with pytest.raises(UserError, match="a vocabulary of 128 and the model one of 64"):
        measure(Known(64, look_up(64)), 64, 4, 0, vocab_size=128)
