"""GRPO: the loss is the paper's, the reward rises, held-out answers are greedy, it resumes and refuses."""

import json
import random

import pytest
import torch
from chats import EXPERTS, interrupt_at, log_of, write_model, write_rows

from small_doge import recipe
from small_doge.data.rendering import Renderer
from small_doge.data.tokenizer import load_tokenizer
from small_doge.errors import UserError
from small_doge.models import load_model
from small_doge.training.grpo import DogeGRPOTrainer, GRPOArguments, encode, grpo
from small_doge.training.sft import SFTArguments, sft


def _questions(n=160, seed=0):
    """Whatever is asked, it is answered `3` or `8`, by chance; 3 is right."""
    rng, rows = random.Random(seed), []
    for i in range(n):
        letters = "abcdefgh"[: rng.randint(1, 8)]
        pair = [
            {"role": "user", "content": f"say {letters} {i}"},
            {"role": "assistant", "content": rng.choice("38")},
        ]
        rows.append({"messages": pair, "answer": 3})
    return rows


@pytest.fixture(scope="module")
def taught(prepared, tmp_path_factory):
    """Folders `dense` and `moe` of models that are right half the time, and their questions in `data.jsonl`."""
    root = tmp_path_factory.mktemp("taught")
    data = write_rows(root / "data.jsonl", _questions())
    for name, options in (("dense", {}), ("moe", EXPERTS)):
        base = write_model(root / f"base-{name}", prepared / "tokenizer", **options)
        sft(
            SFTArguments(
                model=str(base), data=data, output_dir=str(root / name), max_length=128, max_steps=40, use_cpu=True,
                learning_rate=1e-2, per_device_train_batch_size=4, validation_fraction=0.1, report_to="none",
                eval_strategy="no",
            )
        )  # fmt: skip
    return root


@pytest.fixture
def arguments(taught, tmp_path):
    def make(**overrides):
        fields = {
            "model": str(taught / "dense"),
            "data": str(taught / "data.jsonl"),
            "output_dir": str(tmp_path / "run"),
            "max_length": 64,
            "max_completion_length": 4,
            "num_generations": 4,
            "per_device_train_batch_size": 16,
            "per_device_eval_batch_size": 5,
            "validation_fraction": 0.1,
            "learning_rate": 1e-3,
            "max_steps": 8,
            "logging_steps": 3,
            "eval_steps": 4,
            "use_cpu": True,
            "report_to": "none",
        }
        return recipe.build(GRPOArguments, {**fields, **overrides})

    return make


def _trainer(args, dtype=torch.float64):
    """A trainer on the questions of a recipe, and its tokenizer."""
    tokenizer = load_tokenizer(args.model)
    train, held_out, _ = encode(args, tokenizer)
    model = load_model(args.model).to(dtype)
    options = {"train_dataset": train, "eval_dataset": held_out, "processing_class": tokenizer}
    return DogeGRPOTrainer(model, args, **options), tokenizer


def _log_probs(model, prompt, completion):
    """log p of every token of a completion, for one row without padding, by nothing but the model's logits."""
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logits.gather(1, torch.tensor(completion)[:, None])[:, 0]


def test_the_loss_is_that_of_the_paper(arguments):
    """Equations 3 and 4 of arXiv:2402.03300 for one update, each completion alone: no padding, no TRL."""
    args = arguments(beta=0.5, save_strategy="no")
    trainer, tokenizer = _trainer(args)
    rows = [trainer.train_dataset[i // 4] for i in range(16)]
    trainer.model.train()
    inputs = trainer._generate_and_score_completions(rows)
    assert (inputs["prompt_mask"] == 0).any()  # prompts of unequal lengths, so padded on the left
    reference = trainer.ref_model
    with torch.no_grad():  # a policy that is not the reference any more, or the divergence would be 0
        for parameter in trainer.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()

    plain = load_model(args.model).double()
    plain.load_state_dict(trainer.model.state_dict())
    prompts = Renderer(tokenizer).prompts([row["prompt"] for row in rows])
    completions = [
        ids[mask.bool()].tolist() for ids, mask in zip(inputs["completion_ids"], inputs["completion_mask"], strict=True)
    ]
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    rewards = torch.tensor(
        [float(t.split()[-1:] == [row["answer"]]) for t, row in zip(texts, rows, strict=True)]
    ).double()
    groups = rewards.view(-1, 4)
    advantages = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()
    assert advantages.abs().max() > 0.5
    terms = []
    for prompt, completion, advantage in zip(prompts, completions, advantages, strict=True):
        new = _log_probs(plain, prompt, completion)
        with torch.no_grad():
            old = _log_probs(reference, prompt, completion)
        ratio = (new - new.detach()).exp()  # the policy that sampled is the one that is updated: clipping does nothing
        divergence = ((old - new).exp() - (old - new) - 1) * ratio  # TRL corrects it by the ratio, which is 1
        terms.append((ratio * advantage - 0.5 * divergence).mean())
    expected = -torch.stack(terms).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-7)  # advantages are float32
    theirs = dict(trainer.model.named_parameters())
    for name, parameter in plain.named_parameters():
        error = (theirs[name].grad - parameter.grad).norm() / parameter.grad.norm()
        assert error < 1e-3, (name, error)  # TRL's head sums in float32, and terms of a group cancel


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_the_reward_rises(arguments, taught, kind):
    folder = grpo(arguments(model=str(taught / kind), max_steps=40, logging_steps=4, beta=0.0, eval_steps=20))
    rows = [row for row in log_of(folder) if "reward" in row]
    assert rows[0]["reward"] < 0.75
    assert rows[-1]["reward"] > 0.85
    assert rows[0]["reward_std"] > rows[-1]["reward_std"]
    assert all(("balance_loss" in row) == (kind == "moe") for row in rows)
    stage = json.loads((folder / "stage.json").read_text())
    assert stage["after"]["eval_accuracy"] == 1
    assert stage["steps"] == 40
    configs = [json.loads((path / "config.json").read_text()) for path in (taught / kind, folder)]
    assert configs[0] == configs[1]


def test_held_out_figures_are_those_of_greedy_answers(arguments):
    """One question at a time, without TRL and without padding; 16 of them, which batches of 5 do not divide."""
    args = arguments(max_steps=1, validation_fraction=0.2, rewards=["arithmetic", "format"], reward_weights=[1.0, 0.5])
    folder = grpo(args)
    figures = json.loads((folder / "stage.json").read_text())["after"]
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    _, held_out, _ = encode(args, tokenizer)
    right, alone, ended, lengths = [], [], [], []
    for row, prompt in zip(held_out, Renderer(tokenizer).prompts(held_out["prompt"]), strict=True):
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False)[0, len(prompt) :].tolist()
        text = tokenizer.decode(ids, skip_special_tokens=True)
        right.append(text.split()[-1:] == [row["answer"]])
        alone.append(text.strip().isdigit())
        ended.append(ids[-1] == tokenizer.eos_token_id)
        lengths.append(len(ids))
    n = len(right)
    assert n % 5
    assert figures["eval_accuracy"] == pytest.approx(sum(right) / n)
    assert figures["eval_reward"] == pytest.approx((sum(right) + 0.5 * sum(alone)) / n)
    assert figures["eval_ended"] == pytest.approx(sum(ended) / n)
    assert figures["eval_length"] == pytest.approx(sum(lengths) / n)


@pytest.mark.parametrize(
    ("kind", "options"), [("moe", {"gradient_accumulation_steps": 2}), ("dense", {"lora_r": 4, "max_steps": 12})]
)
def test_interrupted_and_resumed_equals_uninterrupted(arguments, taught, tmp_path, monkeypatch, kind, options):
    """Over the end of an epoch too: 144 questions or so, of which 12 steps of 4 · 4 ask more with repetition."""
    options = {"model": str(taught / kind), "data": write_rows(tmp_path / "few.jsonl", _questions(40)), **options}
    whole = grpo(arguments(output_dir=str(tmp_path / "whole"), **options))
    interrupt_at(monkeypatch, options.get("max_steps", 8) - 2)
    with pytest.raises(KeyboardInterrupt):
        grpo(arguments(**options))
    resumed = grpo(arguments(**options))
    clock = ("step_time",)
    logs = [[{k: v for k, v in row.items() if k not in clock} for row in log_of(folder)] for folder in (resumed, whole)]
    assert logs[0] == logs[1]
    ours, theirs = load_model(resumed).state_dict(), load_model(whole).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_every_question_is_asked_once_an_epoch(arguments):
    args = arguments(max_steps=-1, num_train_epochs=2)
    train, held_out, facts = encode(args, load_tokenizer(args.model))
    asked = [row["prompt"][-1]["content"] for row in train]
    n = facts["questions"]
    assert len(set(asked[:n])) == n
    assert asked[n:] != asked[: len(asked) - n]
    assert facts["steps"] == round(2 * n / 4) == len(asked) // 4
    assert not set(asked) & {row["prompt"][-1]["content"] for row in held_out}


def test_letters_of_a_special_token_stay_letters(arguments):
    trainer, tokenizer = _trainer(arguments())
    (ids,) = trainer._tokenize_prompts([[{"role": "user", "content": f"end {tokenizer.eos_token} here"}]])[0]
    assert ids.count(tokenizer.eos_token_id) == 1


def test_code_is_rewarded_in_training(arguments, tmp_path):
    rows = [{"prompt": f"say {i}", "tests": ["assert x == 1"]} for i in range(20)]
    folder = grpo(arguments(data=write_rows(tmp_path / "code.jsonl", rows), rewards=["code"], max_steps=1, beta=0.0))
    assert json.loads((folder / "stage.json").read_text())["after"]["eval_reward"] == 0


@pytest.mark.parametrize(
    ("row", "options", "match"),
    [
        ({"prompt": "say 3"}, {}, "neither `answer` nor `tests`"),
        ({"prompt": "say 3", "answer": "3.5"}, {}, "an answer that is no integer"),
        ({"prompt": "say 3", "answer": True}, {}, "an answer that is no integer"),
        ({"prompt": "say 3", "answer": "three 3"}, {}, "an answer that is no integer"),
        ({"prompt": "say 3", "answer": 3}, {"rewards": ["code"]}, "no `tests`, which the rewards"),
        ({"prompt": "say 3", "tests": "assert x =="}, {"rewards": ["code"]}, "tests that are not Python"),
        ({"prompt": "say 3", "tests": " # nothing"}, {"rewards": ["code"]}, "tests without a statement"),
        ({"prompt": "say 3 " * 30, "answer": 3}, {}, "no room for a completion"),
        ({"chosen": "say 3", "answer": 3}, {}, "which are no questions known here"),
        ({"messages": [{"role": "assistant", "content": "3"}], "answer": 3}, {}, "begins with the assistant"),
    ],
)
def test_data_that_cannot_be_learned_from_is_refused(arguments, tmp_path, row, options, match):
    data = write_rows(tmp_path / "bad.jsonl", [{**row, "n": i} for i in range(3)])
    with pytest.raises(UserError, match=match) as error:
        grpo(arguments(data=data, eval_data=data, **options))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rewards": ["arithmetics"]}, "`rewards` names 'arithmetics'"),
        ({"reward_weights": [1.0, 2.0]}, "`reward_weights` has 2"),
        ({"tokens_per_step": 512}, "count completions"),
        ({"use_vllm": True}, "`use_vllm`"),
        ({"shuffle_dataset": True}, "`shuffle_dataset`"),
        ({"num_generations_eval": 4}, "it is greedy"),
        ({"max_completion_length": 64}, "less than `max_length`"),
        ({"num_generations": 3}, "divisible by num_generations"),
        ({"beta": -0.1}, "`beta` is -0.1"),
    ],
)
def test_a_recipe_that_is_wrong_is_refused(arguments, options, match):
    with pytest.raises(UserError, match=match):
        arguments(**options)


def test_a_model_without_a_chat_template_is_refused(arguments, prepared, tmp_path):
    base = write_model(tmp_path / "base", prepared / "tokenizer")
    (base / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template"):
        grpo(arguments(model=str(base)))


def test_rows_of_every_shape_are_read(arguments, tmp_path):
    rows = [
        [{"question": f"say {i}", "answer": f"First 2.\n#### {i},000"} for i in range(1, 9)],
        [{"prompt": [{"role": "user", "content": f"say {i}"}], "answer": f"-{i}"} for i in range(1, 9)],
        [{"prompt": f"say {i}", "tests": ["x = 1", "assert x"], "answer": i} for i in range(1, 9)],
    ]
    for number, (some, answer, tests) in enumerate(
        zip(rows, ("1000", "-1", "1"), (None, None, "x = 1\nassert x"), strict=True)
    ):
        data = write_rows(tmp_path / f"{number}.jsonl", some)
        args = arguments(data=data, eval_data=data, max_steps=1)
        _, held_out, _ = encode(args, load_tokenizer(args.model))
        row = next(row for row in held_out if row["prompt"][-1]["content"] == "say 1")
        assert (row["answer"], row["tests"]) == (answer, tests)
