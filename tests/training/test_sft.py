"""Fine-tuning: only answers carry loss, packed conversations are alone, it learns, resumes and refuses."""

import json
import math

import pytest
import torch
from chats import EXPERTS, conversations, interrupt_at, log_of, write_model, write_rows
from processes import together

from small_doge import recipe
from small_doge.data.conversations import encode_conversations, read_conversations
from small_doge.data.tokenizer import load_tokenizer
from small_doge.errors import UserError
from small_doge.models import load_model
from small_doge.training import sft as module
from small_doge.training.sft import PackedCollator, SFTArguments, encode, sft


@pytest.fixture(scope="module")
def base(prepared, tmp_path_factory):
    """Folders `dense` and `moe`, and the file `data.jsonl`."""
    root = tmp_path_factory.mktemp("base")
    write_model(root / "dense", prepared / "tokenizer")
    write_model(root / "moe", prepared / "tokenizer", **EXPERTS)
    write_rows(root / "data.jsonl", conversations())
    return root


@pytest.fixture
def arguments(base, tmp_path):
    def make(**overrides):
        fields = {
            "model": str(base / "dense"),
            "data": str(base / "data.jsonl"),
            "output_dir": str(tmp_path / "run"),
            "max_length": 128,
            "tokens_per_step": 512,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 3,
            "validation_fraction": 0.2,
            "learning_rate": 3e-3,
            "max_steps": 10,
            "logging_steps": 3,
            "eval_steps": 5,
            "use_cpu": True,
        }
        return recipe.build(SFTArguments, {**fields, **overrides})

    return make


@pytest.mark.parametrize("packing", [True, False])
def test_what_carries_loss_is_what_the_assistant_says(arguments, packing):
    args = arguments(packing=packing)
    tokenizer = load_tokenizer(args.model)
    train, _, facts = encode(args, tokenizer)
    batch = PackedCollator(tokenizer.pad_token_id)([train[i] for i in range(len(train))])
    learned = tokenizer.decode(batch["labels"][batch["labels"] != -100])
    answers = sorted(text for text in learned.split(tokenizer.eos_token) if text)
    starts = (batch["position_ids"] == 0) & batch["attention_mask"].bool()
    assert facts["conversations"] == starts.sum()
    assert facts["conversations"] + facts["held_out_conversations"] == 120
    asked = tokenizer.decode(batch["input_ids"].flatten(), skip_special_tokens=True).count("say ")
    assert len(answers) == asked
    assert all(text.startswith("long ") and "user" not in text for text in answers)
    assert learned.endswith(tokenizer.eos_token)
    if packing:
        assert len(train) < 0.7 * facts["conversations"]


def test_a_packed_row_is_its_conversations_alone(base):
    model, tokenizer = load_model(base / "dense"), load_tokenizer(base / "dense")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".A"):
                p.normal_()  # scores that differ, so that a window would choose
    encoded, _ = encode_conversations(read_conversations(str(base / "data.jsonl"))[0], tokenizer, 128)
    rows = [module._labels(row) | {"input_ids": row["input_ids"]} for row in encoded.select(range(5))]
    packed = {name: [x for row in rows for x in row[name]] for name in ("input_ids", "labels")}
    packed["seq_lengths"] = [len(row["input_ids"]) for row in rows]
    short = {**rows[0], "seq_lengths": [len(rows[0]["input_ids"])]}  # so that there is padding
    batch = PackedCollator(tokenizer.pad_token_id)([short, packed])
    with torch.no_grad():
        together = model(**batch)
        alone = [model(torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])) for row in rows]
    ends = torch.tensor(packed["seq_lengths"]).cumsum(0).tolist()
    for out, row, end in zip(alone, rows, ends, strict=True):
        found = together.logits[1, end - len(row["input_ids"]) : end]
        torch.testing.assert_close(found, out.logits[0], atol=1e-5, rtol=1e-5)
    counts = [sum(label != -100 for label in row["labels"]) for row in [rows[0], *rows]]
    mean = sum(out.loss * n for out, n in zip([alone[0], *alone], counts, strict=True)) / sum(counts)
    assert together.loss.item() == pytest.approx(mean.item(), abs=1e-6)


def test_packing_changes_no_held_out_figure(arguments, tmp_path):
    """Batches of the one are rows of many conversations, of the other padded ones of few labels."""
    losses = []
    for packing in (True, False):
        folder = sft(arguments(packing=packing, output_dir=str(tmp_path / str(packing)), max_steps=1))
        losses.append(json.loads((folder / "stage.json").read_text())["before"]["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_it_learns_and_leaves_the_model_s_configuration_alone(arguments, base, kind, capsys):
    folder = sft(arguments(model=str(base / kind), max_steps=40, learning_rate=1e-2, eval_steps=40))
    stage = json.loads((folder / "stage.json").read_text())
    assert stage["after"]["eval_loss"] < stage["before"]["eval_loss"] - 2
    assert stage["dropped"] == {}
    configs = [json.loads((path / "config.json").read_text()) for path in (base / kind, folder)]
    assert configs[0] == configs[1]
    assert not (folder / "encoded").exists()
    assert not (folder / "README.md").exists()
    rows = log_of(folder)
    assert rows[0]["step"] == 0
    assert rows[0]["eval_loss"] == stage["before"]["eval_loss"]
    assert all(("balance_loss" in row) == (kind == "moe") for row in rows if "loss" in row)
    printed = capsys.readouterr().out
    assert "held-out loss of an assistant's token" in printed
    assert " left" in printed


def test_the_balance_loss_of_experts_is_in_the_loss(arguments, base, tmp_path):
    first = []
    for coefficient in (0.0, 0.5):
        folder = sft(
            arguments(
                model=str(base / "moe"),
                output_dir=str(tmp_path / str(coefficient)),
                router_aux_loss_coef=coefficient,
                max_steps=1,
                logging_steps=1,
            )
        )
        first.append(next(row for row in log_of(folder) if "loss" in row))
    assert first[0]["balance_loss"] == pytest.approx(first[1]["balance_loss"])
    assert first[1]["loss"] - first[0]["loss"] == pytest.approx(0.5 * first[0]["balance_loss"], abs=1e-4)


def test_the_rate_warms_up_from_near_zero_and_ends_at_a_tenth(arguments):
    folder = sft(arguments(max_steps=20, warmup_steps=0.25, learning_rate=1e-3, logging_steps=1))
    rates = [row["learning_rate"] for row in log_of(folder) if "loss" in row]
    assert rates[:5] == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, 1e-3])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    middle = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 8 / 15))
    assert rates[12] == pytest.approx(1e-3 * middle)
    assert rates[-1] == pytest.approx(1e-4)


@pytest.mark.parametrize(("kind", "options"), [("dense", {}), ("moe", {"lora_r": 4, "lora_dropout": 0.1})])
def test_interrupted_and_resumed_equals_uninterrupted(arguments, base, tmp_path, monkeypatch, kind, options):
    options = {"model": str(base / kind), **options}
    whole = sft(arguments(output_dir=str(tmp_path / "whole"), **options))
    interrupt_at(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        sft(arguments(**options))
    assert (tmp_path / "run" / "checkpoint-4" / "checkpoint.json").is_file()
    monkeypatch.setattr(module, "read_conversations", None)  # what it reads is in its folder
    resumed = sft(arguments(**options))
    assert log_of(resumed) == log_of(whole)
    ours, theirs = load_model(resumed).state_dict(), load_model(whole).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_lora_trains_adapters_and_leaves_a_whole_model(arguments, base):
    folder = sft(arguments(lora_r=8, max_steps=30, learning_rate=1e-2, eval_steps=30))
    stage = json.loads((folder / "stage.json").read_text())
    assert stage["trained_parameters"] < 0.5 * stage["parameters"]
    assert stage["after"]["eval_loss"] < stage["before"]["eval_loss"] - 0.3
    before, after = (load_model(path).state_dict() for path in (base / "dense", folder))
    assert before.keys() == after.keys()
    changed = {name.rsplit(".", 2)[-2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    configs = [json.loads((path / "config.json").read_text()) for path in (base / "dense", folder)]
    assert configs[0] == configs[1]


def test_a_finished_run_is_not_done_again_and_another_is_refused(arguments, base, tmp_path, capsys):
    folder = sft(arguments(max_steps=1))
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    sft(arguments(max_steps=1))
    assert "finished" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"different run: `learning_rate` is .* there and 0.001 here"):
        sft(arguments(max_steps=1, learning_rate=1e-3))
    with pytest.raises(UserError, match=r"different run: `model_sha256`"):
        sft(arguments(max_steps=1, model=str(base / "moe")))
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def tokenizer_config(folder, change):
    """Change a tokenizer's chat template."""
    path = folder / "chat_template.jinja"
    template = change(path.read_text(encoding="utf-8"))
    path.write_text(template, encoding="utf-8") if template else path.unlink()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: None, "has no chat template"),
        (lambda t: t.replace("{%- generation %}", "").replace("{%- endgeneration %}", ""), "no {% generation %} marks"),
        (lambda t: t.replace("start_header_id", "im_start"), "<|im_start|>, which is no token of its vocabulary"),
    ],
)
def test_a_template_that_cannot_be_learned_from_is_refused(arguments, prepared, tmp_path, change, match):
    folder = write_model(tmp_path / "other", prepared / "tokenizer")
    tokenizer_config(folder, change)
    with pytest.raises(UserError) as refused:
        sft(arguments(model=str(folder)))
    assert match in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"model": "nowhere"}, "model nowhere does not exist"),
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"tokens_per_step": 100}, "expected a multiple of the 256 tokens"),
        ({"validation_fraction": 0.0}, "name `eval_data`"),
        ({"router_aux_loss_coef": 0.1}, "has no experts"),
        ({"lora_r": 2, "lora_target_modules": ["q"]}, "expected names of matrices of the model"),
    ],
)
def test_bad_input_gets_one_sentence_and_leaves_nothing(arguments, tmp_path, options, match):
    with pytest.raises(UserError) as refused:
        sft(arguments(**options))
    assert match in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run" / "stage.json").exists()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"model": None}, "`model` is not set"),
        ({"max_length": 1}, "`max_length` is 1"),
        ({"lora_r": 0}, "`lora_r` is 0"),
        ({"max_lenght": 7}, r"unknown field `max_lenght` \(did you mean `max_length`\?\)"),
    ],
)
def test_a_recipe_that_is_wrong_is_refused(arguments, options, match):
    with pytest.raises(UserError, match=match):
        arguments(**options)


# Two processes; what follows runs in each of them, and must be importable there.


def on_one_of_two(_rank, fields):
    sft(recipe.build(SFTArguments, fields | {"ddp_backend": "gloo", "per_device_train_batch_size": 1}))


def test_two_processes_equal_one(arguments, base, tmp_path):
    """Every row of a step is on its own in both, so that the balance loss is the same too."""
    names = ("model", "data", "max_length", "tokens_per_step", "validation_fraction", "learning_rate", "max_steps")
    names = (*names, "logging_steps", "eval_steps", "use_cpu", "per_device_eval_batch_size")
    one = arguments(model=str(base / "moe"), per_device_train_batch_size=1, max_steps=4, logging_steps=1)
    fields = {name: getattr(one, name) for name in names} | {"output_dir": str(tmp_path / "two"), "report_to": "none"}
    together(on_one_of_two, fields)
    rows = zip(log_of(sft(one)), log_of(tmp_path / "two"), strict=True)
    for ours, theirs in rows:
        assert ours.keys() == theirs.keys()
        for name in ours.keys() & {"loss", "grad_norm", "balance_loss", "eval_loss", "num_tokens"}:
            assert theirs[name] == pytest.approx(ours[name], abs=1e-4), name
