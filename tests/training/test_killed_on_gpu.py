"""Pretraining that is killed on a GPU and started again."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


# 20m: through the kernels for large inputs
@pytest.mark.parametrize(("model", "rows", "rate"), [("tiny", 8, 3e-3), ("20m", 160, 1e-3)])
def test_killed_twice_and_resumed_gives_the_curve_of_a_run_that_was_not(prepared, tmp_path, model, rows, rate):
    """SIGKILL, which nothing can answer, between two steps, in one, or while a checkpoint is written."""

    def start(name):
        options = {"model": model, "data": prepared / "data", "tokenizer": prepared / "tokenizer", "max_steps": 300}
        options |= {
            "output_dir": tmp_path / name,
            "per_device_train_batch_size": rows,
            "bf16": True,
            "learning_rate": rate,
        }
        options |= {"logging_steps": 1, "save_steps": 20, "eval_rows": 4, "report_to": "none", "on_bad_step": "ignore"}
        flags = [str(x) for name, value in options.items() for x in (f"--{name}", value)]
        return subprocess.Popen([sys.executable, "-m", "small_doge", "pretrain", *flags], stdout=subprocess.DEVNULL)

    def losses(name):
        history = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        return [row["loss"] for row in history if "loss" in row]

    whole = start("whole")
    killed = 0
    for wanted in ("checkpoint-60", "checkpoint-160"):
        process = start("run")
        while process.poll() is None and not (tmp_path / "run" / wanted).exists():
            time.sleep(0.01)
        time.sleep(0.05 * killed)
        process.kill()
        killed += process.wait() == -signal.SIGKILL
    assert killed == 2  # neither had come to its end
    assert start("run").wait() == whole.wait() == 0
    assert len(losses("run")) == 300
    assert max(abs(a - b) for a, b in zip(losses("run"), losses("whole"), strict=True)) < 1e-3
    assert losses("run")[-1] < losses("run")[0] - 1
