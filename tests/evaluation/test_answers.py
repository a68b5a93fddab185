"""Held-out questions to models: the figures are those computed one by one, and the answers those of `generate`."""

import json
import math

import pytest
import torch

from small_doge.data.rendering import Renderer
from small_doge.data.tokenizer import TokenizerRecipe, load_tokenizer, train_tokenizer
from small_doge.errors import UserError
from small_doge.evaluation.answers import AnswersRecipe, answers, ask, log_probs, measure
from small_doge.models import DogeForCausalLM, config_for, load_model

WORDS = "return the joined path of a file as text or raise an error where it is not found".split()


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """Two small models and questions for them."""
    desk = tmp_path_factory.mktemp("answers")
    (desk / "corpus.txt").write_text(" ".join(WORDS * 30), encoding="utf-8")
    train_tokenizer(
        TokenizerRecipe(str(desk / "tokenizer"), corpus=str(desk / "corpus.txt"), vocab_size=300, validation_fraction=0)
    )
    tokenizer = load_tokenizer(desk / "tokenizer")
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    for seed, name in enumerate(("sft", "dpo")):
        torch.manual_seed(seed)
        config = config_for("tiny", vocab_size=len(tokenizer), num_key_value_heads=1, **sizes, **special)
        DogeForCausalLM(config).save_pretrained(desk / name)
        tokenizer.save_pretrained(desk / name)
    replies = [" ".join(WORDS[i % 7 : i % 7 + 2 + i % 5]) for i in range(40)]
    rows = [
        {"messages": [{"role": "user", "content": f"What is `{i}`?"}, {"role": "assistant", "content": reply}]}
        for i, reply in enumerate(replies)
    ]
    pairs = [
        {"prompt": f"What is `{i}`?", "chosen": reply, "rejected": replies[i ^ 1]} for i, reply in enumerate(replies)
    ]
    for kind, there in (("conversations", rows), ("preferences", pairs)):
        (desk / "questions" / kind).mkdir(parents=True)
        lines = "".join(json.dumps(row) + "\n" for row in there)
        (desk / "questions" / kind / "test.jsonl").write_text(lines, encoding="utf-8")
    return desk


def recipe(desk, output_dir, **options):
    models = [str(desk / "sft"), str(desk / "dpo")]
    sizes = {"rows": 20, "asked": 5, "shown": 3, "max_new_tokens": 8} | options
    return AnswersRecipe(models, str(desk / "questions"), str(output_dir), **sizes)


def test_log_probs_are_those_of_each_row_alone(desk):
    model = load_model(desk / "sft")
    rows = [([1, 5, 6], [7, 8]), ([1, 9], [10, 11, 12, 13]), ([1, 20, 21, 22, 23, 24, 25], [30])]
    for (prompt, reply), (found, count) in zip(rows, log_probs(model, rows), strict=True):
        with torch.no_grad():
            told = model(torch.tensor([prompt + reply])).logits[0].log_softmax(-1)
        expected = sum(float(told[len(prompt) + i - 1, token]) for i, token in enumerate(reply))
        assert count == len(reply)
        assert found == pytest.approx(expected, abs=1e-4)


def test_figures_follow_their_definitions(desk):
    model, tokenizer = load_model(desk / "sft"), load_tokenizer(desk / "sft")
    asked = [{"role": "user", "content": "What is it?"}]
    row = {"messages": [*asked, {"role": "assistant", "content": "the joined path"}]}
    pair = {"prompt": "What is it?", "chosen": "the joined path", "rejected": "raise an error where it is"}
    other = {"prompt": "What of it?", "chosen": pair["rejected"], "rejected": pair["chosen"]}
    figures = measure(model, tokenizer, [row], [pair, other])
    (chat,) = Renderer(tokenizer).encode([row["messages"]])
    labels = torch.tensor([[i if m else -100 for i, m in zip(chat.input_ids, chat.mask, strict=True)]])
    with torch.no_grad():
        loss = float(model(torch.tensor([chat.input_ids]), labels=labels).loss)
    assert figures["loss"] == pytest.approx(loss, abs=1e-4)
    exchanged = [p | {"chosen": p["rejected"], "rejected": p["chosen"]} for p in (pair, other)]
    swapped = measure(model, tokenizer, [row], exchanged)
    assert figures["preference_accuracy"] + swapped["preference_accuracy"] == 1
    assert figures["matched"] + swapped["matched"] == 1
    alone = measure(model, tokenizer, [row], [pair, pair])
    assert alone["chosen_loss"] == pytest.approx(loss, abs=1e-4)


def test_an_answer_that_meets_its_end_token_has_ended(desk):
    model, tokenizer = load_model(desk / "sft"), load_tokenizer(desk / "sft")
    questions = ["What is `1`?", "And what is the other one, then?"]
    texts, ended = ask(model, tokenizer, questions, 4)
    assert len(texts) == len(ended) == 2
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))  # all tokens alike: the first
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    first = int(torch.zeros(model.config.vocab_size).argmax())
    assert ask(model, tokenizer, questions, 4)[1] == [first == tokenizer.eos_token_id] * 2


def test_they_are_written_once(desk, tmp_path, capsys):
    folder = answers(recipe(desk, tmp_path / "answers"))
    found = json.loads((folder / "answers.json").read_text(encoding="utf-8"))
    assert list(found["figures"]) == ["sft", "dpo"]
    assert all(math.isfinite(value) for figures in found["figures"].values() for value in figures.values())
    assert [found[name] for name in ("conversations", "pairs", "asked")] == [20, 20, 5]
    assert len(found["shown"]) == 3
    assert set(found["shown"][0]) == {"question", "docstring", "answers"}
    capsys.readouterr()
    answers(recipe(desk, tmp_path / "answers"))
    assert "already" in capsys.readouterr().out
    with pytest.raises(UserError, match="different run"):
        answers(recipe(desk, tmp_path / "answers", asked=4))


def test_what_is_missing_is_one_sentence(desk, tmp_path):
    with pytest.raises(UserError, match="`models`: .*nowhere holds no"):
        answers(AnswersRecipe([str(tmp_path / "nowhere")], str(desk / "questions"), str(tmp_path / "a")))
    with pytest.raises(UserError, match="`questions`: .*nowhere holds no"):
        answers(AnswersRecipe([str(desk / "sft")], str(tmp_path / "nowhere"), str(tmp_path / "a")))
    with pytest.raises(ValueError, match="`asked` is 0"):
        recipe(desk, tmp_path / "a", asked=0)
