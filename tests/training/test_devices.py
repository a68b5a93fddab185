"""Many devices, as two processes on a CPU: the curve of one, resumed on another number, sharded or whole."""

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from processes import together

from small_doge import recipe
from small_doge.errors import UserError
from small_doge.models import DogeForCausalLM, load_model
from small_doge.training import devices
from small_doge.training.checkpoints import newest
from small_doge.training.pretrain import PretrainArguments, pretrain

STEPS = 50
RECIPES = Path(__file__).parents[2] / "recipes" / "accelerate"


def lines(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [row for row in history if "loss" in row]


def validated(kind):
    """What `accelerate launch --config_file` makes of a file of ours."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    words = ["--config_file", str(RECIPES / f"{kind}.yaml"), "-m", "small_doge"]
    return _validate_launch_command(launch_command_parser().parse_args(words))[0]


def launched(kind):
    """What it then puts into the environment of its processes."""
    from accelerate.utils import prepare_multi_gpu_env

    environment = prepare_multi_gpu_env(validated(kind))
    return {k: v for k, v in environment.items() if os.environ.get(k) != v and k.startswith(("ACCELERATE", "FSDP"))}


def half(run, to, step=STEPS // 2):
    """The folder of a run as it was when it had written the checkpoint of a step, by default of half of them."""
    to.mkdir(exist_ok=True)
    shutil.copytree(run / f"checkpoint-{step}", to / f"checkpoint-{step}")
    shutil.copy(run / "run.json", to)
    return to


def shard_on_a_cpu():
    """accelerate turns FSDP on for GPUs alone; this does on a CPU what its AcceleratorState does there."""
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    original = AcceleratorState.__init__

    def initialise(self, *args, fsdp_plugin=None, **kwargs):
        fresh = AcceleratorState._shared_state == {}
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fresh and fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = self.distributed_type

    AcceleratorState.__init__ = initialise
    devices.NEVER_SHARDED.discard("cpu")


def worker(rank, runs, queue):
    """One process of several: several runs, one after the other; the first says how they ended."""
    if "ACCELERATE_USE_FSDP" in os.environ:
        shard_on_a_cpu()
    for fields in runs:
        before = fields.pop("half", None)
        if rank == 0 and before:
            half(Path(before), Path(fields["output_dir"]))
        torch.distributed.barrier()
        try:
            pretrain(recipe.build(PretrainArguments, fields))
            said = "done"
        except UserError as error:
            said = str(error)
        if rank == 0:
            queue.put(said)


def said_of(kind, runs, processes=2):
    """Some processes, launched as a file of ours says, do some runs; what each run said at its end."""
    queue = torch.multiprocessing.get_context("forkserver").SimpleQueue()
    together(worker, runs, queue, environment=launched(kind), processes=processes)
    return [queue.get() for _ in runs]


@pytest.fixture(scope="module")
def fields(prepared):
    """A function that makes the fields of a run of four rows a step, two a device."""

    def make(out, **overrides):
        common = {"model": "tiny", "data": str(prepared / "data"), "tokenizer": str(prepared / "tokenizer")}
        common |= {"max_steps": STEPS, "logging_steps": 1, "save_steps": STEPS // 2, "learning_rate": 1e-3}
        common |= {"per_device_train_batch_size": 2, "tokens_per_step": 4 * 32, "eval_rows": 4, "use_cpu": True}
        return common | {"report_to": "none", "output_dir": str(out), **overrides}

    return make


@pytest.fixture(scope="module")
def alone(fields, tmp_path_factory):
    """One process."""
    folder = tmp_path_factory.mktemp("devices")
    pretrain(recipe.build(PretrainArguments, fields(folder / "one")))
    pretrain(recipe.build(PretrainArguments, fields(folder / "one-muon", max_steps=8, muon_learning_rate=1e-2)))
    return folder


@pytest.fixture(scope="module")
def ddp(fields, alone):
    half(alone / "one", alone / "one-to-two")
    # with a checkpoint at 5 and lines of the log at 4 and 8
    few = {"max_steps": 8, "save_steps": 5, "logging_steps": 4}
    pretrain(recipe.build(PretrainArguments, fields(alone / "one-few", **few)))
    half(alone / "one-few", alone / "few-one-to-two", 5)
    runs = [fields(alone / "two"), fields(alone / "one-to-two"), fields(alone / "two-few", **few)]
    said = said_of("ddp", [*runs, fields(alone / "few-one-to-two", **few)])
    assert said == ["done"] * 4
    half(alone / "two", alone / "two-to-one")
    pretrain(recipe.build(PretrainArguments, fields(alone / "two-to-one")))
    half(alone / "two-few", alone / "few-two-to-one", 5)
    pretrain(recipe.build(PretrainArguments, fields(alone / "few-two-to-one", **few)))
    return alone


@pytest.fixture(scope="module")
def fsdp(fields, alone):
    """Runs with sharded checkpoints, and what became of one that was begun otherwise."""
    half(alone / "one", alone / "whole")
    runs = [
        fields(alone / "fsdp", sample_prompts=["the dog"], sample_at=[0.5], sample_tokens=4),
        fields(alone / "fsdp-half", half=str(alone / "fsdp")),
        fields(alone / "fsdp-muon", max_steps=8, muon_learning_rate=1e-2, on_bad_step="skip"),
        fields(alone / "whole"),
    ]
    *done, refused = said_of("fsdp2", runs)
    assert done == ["done"] * 3
    return alone, refused


def apart(one, other):
    """The largest difference between the losses of two runs, and between their weights at the end."""
    losses = [[row["loss"] for row in lines(folder)] for folder in (one, other)]
    assert len(losses[0]) == len(losses[1])
    return max(abs(x - y) for x, y in zip(*losses, strict=True)), apart_weights(one, other)


def apart_weights(one, other):
    tensors = [load_model(folder).state_dict() for folder in (one, other)]
    return max((x - tensors[1][name]).abs().max().item() for name, x in tensors[0].items())


@pytest.mark.parametrize("name", ["two", "one-to-two", "two-to-one"])
def test_ddp_gives_the_curve_of_one_process_resumed_on_either_number(ddp, name):
    losses, weights = apart(ddp / "one", ddp / name)
    print(name, losses, weights)
    assert losses < 1e-5
    assert weights < 1e-5
    assert lines(ddp / name)[0]["loss"] - lines(ddp / name)[-1]["loss"] > 1.0
    record = json.loads((ddp / name / f"checkpoint-{STEPS}" / "checkpoint.json").read_text())
    assert record["processes"] == (1 if name == "two-to-one" else 2)


@pytest.mark.parametrize("name", ["two-few", "few-one-to-two", "few-two-to-one"])
def test_a_line_of_the_log_begun_on_another_number_is_whole(ddp, name):
    """A checkpoint between two lines carries the mean loss of all processes, not that of the first."""
    losses, _ = apart(ddp / "one-few", ddp / name)
    assert losses < 1e-5


@pytest.mark.parametrize(("one", "other"), [("one", "fsdp"), ("one", "fsdp-half"), ("one-muon", "fsdp-muon")])
def test_fsdp_gives_the_curve_of_one_process_resumed_and_with_muon(fsdp, one, other):
    losses, weights = apart(fsdp[0] / one, fsdp[0] / other)
    print(other, losses, weights)
    assert losses < 1e-5
    assert weights < 1e-5


def test_a_sharded_checkpoint_is_sealed_and_read_by_a_run_that_continues(fsdp, fields, capsys):
    folder, _ = fsdp
    checkpoint = folder / "fsdp" / f"checkpoint-{STEPS // 2}"
    record = json.loads((checkpoint / "checkpoint.json").read_text())
    shards = [name for name in record["files"] if name.startswith("pytorch_model_fsdp_0/") and name.endswith(".distcp")]
    assert len(shards) == 2
    assert not (checkpoint / "model.safetensors").exists()
    on = pretrain(
        recipe.build(
            PretrainArguments,
            fields(folder / "on", continue_from=str(checkpoint), max_steps=2, learning_rate=0.0, decay_steps=0),
        )
    )
    assert "fresh optimiser (its own is fsdp sharded, this run is whole)" in capsys.readouterr().out
    assert apart_weights(on, folder / "one" / checkpoint.name) < 1e-5
    shard = folder / "fsdp-half" / f"checkpoint-{STEPS}" / shards[0]
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(UserError, match=r"is cut short: pytorch_model_fsdp_0/.* has 100 bytes"):
        newest(folder / "fsdp-half")


@pytest.mark.slow  # a process of its own, and 25 steps
def test_a_sharded_checkpoint_is_resumed_by_one_process(fsdp, fields):
    folder, _ = fsdp
    [said] = said_of("fsdp2", [fields(folder / "fsdp-on-one", half=str(folder / "fsdp"))], processes=1)
    assert said == "done"
    losses, weights = apart(folder / "one", folder / "fsdp-on-one")
    assert losses < 1e-5
    assert weights < 1e-5


def test_all_processes_complete_a_prompt_together(fsdp):
    assert len((fsdp[0] / "fsdp" / "samples.jsonl").read_text().splitlines()) == 1


def test_another_kind_of_launch_is_refused(fsdp):
    assert "holds whole weights and this run fsdp sharded ones, expected the same kind of launch" in fsdp[1]
    assert not (fsdp[0] / "whole" / "stage.json").exists()


@pytest.mark.parametrize(
    ("environment", "fields", "sentence"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, {"muon_learning_rate": 0.01}, "under FSDP version 1"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {"muon_learning_rate": 0.01}, "`muon_learning_rate` is 0.01 under Deep"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {"on_bad_step": "skip"}, "`on_bad_step` is skip under DeepSpeed"),
        ({}, {"on_bad_step": "skip", "optim": "adafactor"}, "`on_bad_step` is skip with `optim: adafactor`"),
    ],
)
def test_optimisers_that_cannot_be_shared_out_are_refused(arguments, monkeypatch, environment, fields, sentence):
    args = arguments(**fields)
    monkeypatch.setattr(devices, "NEVER_SHARDED", set())
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=sentence):
        devices.require_optimizer(args)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_for_accelerate_are_what_accelerate_reads(path):
    """Its own loader refuses unknown keys; what stands there is what a process is told."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import FullyShardedDataParallelPlugin

    config = load_config_from_file(str(path))
    expected = {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}.get(path.stem, "DEEPSPEED")
    assert config.distributed_type == expected
    assert config.num_processes == 8
    assert path.read_text(encoding="utf-8").count("#") >= 4
    if expected == "DEEPSPEED":
        args = validated(path.stem)
        assert args.use_deepspeed
        assert (args.zero_stage, args.gradient_clipping) == (int(path.stem[-1]), "auto")
        return
    environment = launched(path.stem)
    if expected == "FSDP":
        assert environment["FSDP_VERSION"] == "2"
        assert environment["FSDP_TRANSFORMER_CLS_TO_WRAP"] in DogeForCausalLM._no_split_modules
        assert FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=environment["FSDP_STATE_DICT_TYPE"])


def test_the_projection_is_the_formula_of_its_page(tmp_path):
    """By hand for 160M, 330,000 tokens/s, on 64 GPUs: 8 nodes, 611 MB of gradients in 24 buckets, 12 rows a GPU."""
    spec = importlib.util.spec_from_file_location("many_devices", RECIPES.parents[1] / "benchmarks" / "many_devices.py")
    many_devices = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = many_devices  # dataclasses look there
    spec.loader.exec_module(many_devices)
    P = many_devices.parameters_of("160m")
    assert P == 152_676_168
    found = many_devices.project("160m", P, 330e3, 64, many_devices.Cluster())
    exchange = 2 * 7 / 8 * 4 * P / 360e9 + 2 * 7 / 8 * 4 * P / 8 / 40e9 + 24 * (14 * 2e-6 + 6 * 6e-6)
    update = 40 * P / 3.4e12
    compute = max(((3 << 19) / 330e3 - update) / 64, 24 * 5e-3) + update
    assert compute > 24 * 5e-3 > ((3 << 19) / 330e3 - update) / 64  # so few rows wait for Python
    exposed = max(exchange / 24, exchange - 2 / 3 * (compute - update) * 23 / 24)
    assert found["exchange_ms"] == pytest.approx(1e3 * exchange)
    assert found["tokens_per_second"] == pytest.approx((3 << 19) / (compute + exposed))
    assert many_devices.project("160m", P, 330e3, 1, many_devices.Cluster())["efficiency"] == pytest.approx(1, abs=1e-6)
    assert many_devices.project("20m", P, 330e3, 512, many_devices.Cluster()) is None
    (tmp_path / "rates.csv").write_text("size,model,tokens_per_second\n20m,ours,5\n20m,ours,7\n20m,other,9\n")
    assert many_devices.read_rates(tmp_path / "rates.csv") == {"20m": 7.0}
    page = many_devices.PAGE.read_text(encoding="utf-8")
    assert "| 320m |" in page[page.index(many_devices.BEGIN) : page.index(many_devices.END)]
