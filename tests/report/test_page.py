import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from small_doge import DogeConfig, DogeForCausalLM
from small_doge.artifacts import duration, finish, write_json
from small_doge.errors import UserError
from small_doge.evaluation.expert_use import evenness
from small_doge.report.page import ReportRecipe, report, text
from small_doge.report.run import read_run, size, verdict

HOSTILE = "</pre><script>alert(1)</script><img src=http://example.com/x onerror=alert(2)> & \x00 \ud800 \u2028 end"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run folder as the stages leave it, around a tiny untrained model."""
    from small_doge.data.tokenizer import TokenizerRecipe, train_tokenizer

    run = tmp_path_factory.mktemp("a run & more")
    corpus = run.parent / "corpus.txt"
    corpus.write_text("def area(width, height):\n    return width * height\n" * 20, encoding="utf-8")
    train_tokenizer(
        TokenizerRecipe(str(run / "tokenizer"), corpus=str(corpus), vocab_size=300, validation_fraction=0.0)
    )
    for name in ("data", "pretrain", "evaluation"):
        (run / name).mkdir()

    split = {"bytes": 12_345_678, "documents": 776, "tokens": 4_000_000, "rows": 4000}
    write_json(run / "data/manifest.json", {"splits": {"train": split, "validation": split}, "row_length": 1024})
    finish(run / "data", "prepare", {"row_length": 1024}, 21.0)

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = DogeForCausalLM(DogeConfig(vocab_size=300, num_key_value_heads=2, keep_window_size=24, **shape))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.A.normal_()
            layer.self_attn.dt_proj.weight.normal_(std=10)
    model.save_pretrained(run / "pretrain")
    for file in (run / "tokenizer").glob("tokenizer*"):
        (run / "pretrain" / file.name).write_bytes(file.read_bytes())
    history = [
        {
            "step": s,
            "loss": 3 + 6 / s,
            "bits_per_byte": 1.3 + 2.6 / s,
            "learning_rate": s / 1e5,
            "tokens_per_second": 9e4,
        }
        for s in range(1, 41)
    ]
    history += [{"step": s, "eval_loss": 3.1 + 6 / s, "eval_bits_per_byte": 1.4 + 2.6 / s} for s in (10, 20, 30, 40)]
    write_json(run / "pretrain/trainer_state.json", {"log_history": history})
    samples = [
        {"step": 10, "tokens": 163840, "prompt": "def ", "completion": "self self (((\n  self"},
        {"step": 20, "tokens": 327680, "prompt": "def ", "completion": "MIDDLE"},
        {"step": 40, "tokens": 655360, "prompt": "def ", "completion": HOSTILE},
        {"step": 40, "tokens": 655360, "prompt": "import ", "completion": "os\nimport sys\n"},
    ]
    lines = "\n".join(map(json.dumps, samples)) + '\n{"step": 40, "pro'
    (run / "pretrain/samples.jsonl").write_text(lines, encoding="utf-8")
    finish(run / "pretrain", "pretrain", {"learning_rate": 8e-3, "note": "<script>"}, 1234.5)

    bits = {"model": 1.68, "xz -9": 1.75, "xz -9 after the training text": 1.25, "order-5 n-gram": 1.70}
    results = {"bits_per_byte": bits, "bytes": 207_699, "documents": 20, "tokens": 60_000, "loss": 3.2, "seconds": {}}
    write_json(run / "evaluation/results.json", results | {"baseline_training_bytes": 12_345_678})
    finish(run / "evaluation", "evaluate", {}, 40.0)
    return run


def copied(finished, tmp_path, without=()):
    """The run again, less some files."""
    for path in finished.rglob("*"):
        name = path.relative_to(finished).as_posix()
        if path.is_file() and not any(name.startswith(prefix) for prefix in without):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(path.read_bytes())
    return tmp_path


class Page(HTMLParser):
    """Collects tags with their attributes, and checks that they close in order."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, content):
        super().__init__()
        self.tags, self.open, self.headings, self.words = [], [], [], []
        self.feed(content)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def test_the_page_is_whole_loads_nothing_and_escapes_what_the_model_wrote(finished, tmp_path, capsys):
    run = copied(finished, tmp_path)
    path = report(ReportRecipe(str(run)))
    assert path == run / "report.html"
    content = path.read_bytes().decode("utf-8")
    page = Page(content)
    assert page.headings == [
        "Numbers",
        "Time",
        "Training",
        "Beside a compressor and counting",
        "Attention",
        "What it writes",
        "Try it",
        "Settings and versions",
    ]
    assert not {"script", "link", "iframe", "object", "embed"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:")
    assert "url(" not in content
    assert sum(tag == "img" for tag, _ in page.tags) == 7
    words = "".join(page.words)
    assert "Experts" not in words
    assert "Balance loss" not in words
    assert "<script>alert(1)</script><img src=http://example.com/x onerror=alert(2)>" in words
    assert "MIDDLE" not in words
    assert "self self (((" in words
    assert f"doge generate --model {run / 'pretrain'}" in words
    assert "better than xz -9 (1.750) and order-5 n-gram (1.700), but not than xz -9 after the training text" in words
    names = {
        "stage_times",
        "loss",
        "bits_per_byte",
        "learning_rate",
        "comparison",
        "attention_layer_1",
        "attention_layer_2",
    }
    assert {p.name for p in (run / "figures").iterdir()} == {f"{name}.png" for name in names}
    assert not list(run.rglob("*.partial"))
    printed = capsys.readouterr().out
    assert "bits" in printed
    assert str(path) in printed


def test_missing_parts_are_said_and_the_report_can_be_written_again(finished, tmp_path):
    run = copied(finished, tmp_path, ("evaluation", "data", "tokenizer", "pretrain/samples", "pretrain/tokenizer"))
    report(ReportRecipe(str(run)))
    path = report(ReportRecipe(str(run), output=str(run / "new" / "page.html")))
    words = "".join(Page(path.read_text(encoding="utf-8")).words)
    assert "has not been evaluated" in words
    assert "wrote no samples" in words
    assert "No picture of attention" in words
    assert "Prepare the data: not in this run" in words


def test_scores_of_tasks_have_a_table_and_a_picture(finished, tmp_path):
    run = copied(finished, tmp_path)
    score = {"metric": "acc", "score": 31.5, "stderr": 1.2, "interval": [29.2, 33.9], "chance": 25.0}
    score |= {"at_chance": False, "documents": 1500, "num_fewshot": 5, "truncated": 7, "requests": 6000}
    guess = score | {"score": 25.5, "interval": [23.0, 28.1], "at_chance": True, "truncated": 0, "notes": ["<b>odd"]}
    results = {"name": "<i>demo$x^2$", "suite": "doge-base", "limit": None, "context_length": 2048, "notes": []}
    results |= {"scores": {"mmlu": score | {"notes": []}, "arc_easy": guess}, "versions": {"lm_eval": "0.4"}}
    results["settings"] = {"suite": "doge-base", "num_fewshot": 5, "limit": None}
    write_json_in(run / "pretrain/evaluation/doge-base/results.json", results)
    write_json_in(run / "evaluation/results.json", results)  # instead of bits per byte
    content = report(ReportRecipe(str(run))).read_text(encoding="utf-8")
    page = Page(content)
    assert "Questions with known answers" in page.headings
    words = "".join(page.words)
    assert words.count("MMLU31.50 ± 1.2025.0025.4326.41") == 2
    assert "25.50 ± 1.20 (chance)" in words
    assert "2,048 tokens lost their start: MMLU 7 of 6,000" in words
    assert "ARC-E: <b>odd." in words
    assert "The model has not been evaluated: there is no evaluation/results.json" in words
    assert {"scores_1", "scores_2"} <= {p.stem for p in (run / "figures").iterdir()}


def with_experts(run):
    """Make the run one of a model with 16 experts a layer, 5 of which the first layer never chose."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.003}
    DogeForCausalLM(DogeConfig(vocab_size=300, keep_window_size=24, **shape, **experts)).save_pretrained(
        run / "pretrain"
    )
    state = json.loads((run / "pretrain/trainer_state.json").read_text())
    for row in state["log_history"]:
        if "loss" in row:
            row["balance_loss"] = 1 + 1 / row["step"]
    write_json(run / "pretrain/trainer_state.json", state)
    counts = np.array([[0] * 5 + [9] * 10 + [110], [11, 13] * 7 + [12, 20]])
    assert counts.sum(axis=1).tolist() == [200, 200]
    np.save(run / "evaluation/expert_use.npy", counts)
    results = json.loads((run / "evaluation/results.json").read_text())
    use = {"num_experts": 16, "num_experts_per_tok": 2, "tokens": 100, "layers": evenness(counts)}
    write_json(run / "evaluation/results.json", results | {"expert_use": use})
    return run


def test_a_model_with_experts_shows_how_they_are_used(finished, tmp_path):
    run = with_experts(copied(finished, tmp_path))
    page = Page(report(ReportRecipe(str(run))).read_text(encoding="utf-8"))
    assert page.headings[4] == "Experts"
    assert sum(tag == "img" for tag, _ in page.tags) == 9
    assert {"expert_use.png", "balance_loss.png"} <= {p.name for p in (run / "figures").iterdir()}
    alts = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert any("each expert of each layer" in alt for alt in alts)
    words = "".join(page.words)
    assert "sends every token to 2 of them" in words
    assert "12.5 times in the 100 tokens" in words
    assert "131.2 %8.8×" in words  # layer 1, 5 of 16, 110 against 12.5
    assert "20 %1.6×16" in words  # layer 2, none, 20 against 12.5, as wide as nearly all
    assert "0.003 times the mean of the layers is part of the training loss" in words
    assert "Experts of a layer / of a token16 / 2" in words
    assert "Balance loss, last logged (1: experts evenly used)1.025" in words
    assert "Experts never chosen on held-out text, mean of layers15.6 %" in words


def test_a_model_with_experts_that_was_not_evaluated_says_what_to_do(finished, tmp_path):
    run = with_experts(copied(finished, tmp_path))
    for name in ("results.json", "expert_use.npy"):
        (run / "evaluation" / name).unlink()
    words = "".join(Page(report(ReportRecipe(str(run))).read_text(encoding="utf-8")).words)
    assert "Their use has not been measured: doge evaluate on this model does." in words
    assert "part of the training loss" in words


def test_counts_cut_short_are_named(finished, tmp_path):
    run = with_experts(copied(finished, tmp_path))
    path = run / "evaluation/expert_use.npy"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"expert_use\.npy cannot be read"):
        report(ReportRecipe(str(run)))


def test_answers_have_a_table_and_the_texts(finished, tmp_path):
    run = copied(finished, tmp_path)
    (run / "answers").mkdir()
    (run / "dpo").mkdir()
    finish(run / "dpo", "dpo", {}, 60.0)
    figures = {"loss": 2.5, "ended": 0.984, "preference_accuracy": 0.7125, "chosen_loss": float("nan")}
    item = {"question": HOSTILE, "docstring": HOSTILE, "answers": {"pretrain": HOSTILE, "dpo": ""}}
    counts = {"conversations": 256, "pairs": 200, "asked": 128}
    found = {"figures": {"pretrain": figures, "dpo": {"loss": 2.25}}, "shown": [item], **counts}
    (run / "answers/answers.json").write_text(json.dumps(found))  # JSON can spell what UTF-8 cannot
    page = report(ReportRecipe(str(run))).read_text(encoding="utf-8")
    assert page.count(text(HOSTILE)) == 4  # one of them a sample of pretraining
    assert "<script" not in page
    for said in ("<th>Base</th><th>DPO</th>", "2.500", "2.250", "98%", "71.2%", "<td>–</td>", "(nothing)"):
        assert said in page
    assert "doge chat --model" in page
    assert "Teach it to prefer (DPO)" in page


def test_a_run_without_answers_does_not_speak_of_them(finished, tmp_path):
    page = report(ReportRecipe(str(copied(finished, tmp_path)))).read_text(encoding="utf-8")
    for said in ("What it answers", "doge chat", "SFT", "Write questions"):
        assert said not in page


def write_json_in(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)


def test_without_pretraining_there_is_nothing_to_report(finished, tmp_path):
    run = copied(finished, tmp_path, ("pretrain/stage.json",))
    before = sorted(run.rglob("*"))
    with pytest.raises(UserError, match="no finished pretraining"):
        report(ReportRecipe(str(run)))
    assert sorted(run.rglob("*")) == before
    with pytest.raises(UserError, match="is a folder"):
        report(ReportRecipe(str(finished), output=str(run)))


@pytest.mark.parametrize(
    ("bits", "said"),
    [
        ({}, "not been evaluated"),
        ({"model": 2.0}, "No baseline"),
        ({"model": 2.0, "a": 3.0, "b": 4.0}, "better than every baseline measured: a \\(3.000\\) and b"),
        ({"model": 2.0, "a": 1.0, "b": 2.0}, "worse than every baseline measured: a"),
        ({"model": 2.0, "a": 1.0, "b": 3.0}, "better than b \\(3.000\\), but not than a \\(1.000\\)"),
    ],
)
def test_the_verdict_tells_the_truth_whichever_way_it_went(finished, bits, said):
    run = read_run(finished)
    run.results.clear()
    run.results.update({"bits_per_byte": bits, "bytes": 1000} if bits else {})
    assert re.search(said, verdict(run))


def test_words_for_times_sizes_and_forbidden_characters():
    assert [duration(s) for s in (0.24, 59.6, 200, 7500)] == ["0.2 s", "1 min 0 s", "3 min 20 s", "2 h 5 min"]
    assert [size(n) for n in (999, 11_832_000, 2e9)] == ["999 B", "11.8 MB", "2 GB"]
    assert text("<a b='\x00\x7f\ud800'>\U0001f436") == "&lt;a b=&#x27;\ufffd\ufffd\ufffd&#x27;&gt;\U0001f436"
