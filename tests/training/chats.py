"""Small conversations, preferences and models for the tests of `sft` and `dpo`."""

import json
import os
import random
import signal

import torch

from small_doge.data.tokenizer import load_tokenizer
from small_doge.models import DogeForCausalLM, config_for
from small_doge.training.callbacks import SaveOnInterrupt

WORDS = "the dog runs to a small house and reads one long book about tiny models".split()
EXPERTS = {"is_moe": True, "num_experts": 64, "num_experts_per_tok": 4}
UNLIKE = ("tokens_per_second", "train_runtime")  # what the clock says


def write_model(folder, tokenizer, seed=0, **options):
    """A very small model with the tokenizer of a folder; returns its folder."""
    torch.manual_seed(seed)
    tok = load_tokenizer(tokenizer)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {name: getattr(tok, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = config_for("tiny", vocab_size=len(tok), **{**sizes, "num_key_value_heads": 1, **special, **options})
    DogeForCausalLM(config).save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def conversations(n=120, seed=0):
    """One to three exchanges: `say dog 7` is answered `long dog`."""
    rng, rows = random.Random(seed), []
    for i in range(n):
        words = [rng.choice(WORDS) for _ in range(rng.randint(1, 3))]
        turns = [[("user", f"say {word} {i}"), ("assistant", f"long {word}")] for word in words]
        rows.append({"messages": [{"role": role, "content": text} for turn in turns for role, text in turn]})
    return rows


def preferences(n=120, seed=0):
    """`small dog` is preferred to the `long dog` that conversations teach."""
    rng = random.Random(seed)
    words = [rng.choice(WORDS) for _ in range(n)]
    return [{"prompt": f"say {w} {i}", "chosen": f"small {w}", "rejected": f"long {w}"} for i, w in enumerate(words)]


def log_of(folder):
    """All that was logged but for speeds."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    kept = [{k: v for k, v in row.items() if not k.endswith(("per_second", "runtime"))} for row in history]
    return [row for row in kept if "train_loss" not in row]


def interrupt_at(monkeypatch, step):
    """Send this process SIGINT when training reaches a step, once, as Ctrl-C does."""
    waiting, original = [step], SaveOnInterrupt.on_step_begin

    def on_step_begin(self, args, state, control, **kwargs):
        if waiting and state.global_step == waiting[0]:
            waiting.pop()
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, args, state, control, **kwargs)

    monkeypatch.setattr(SaveOnInterrupt, "on_step_begin", on_step_begin)
