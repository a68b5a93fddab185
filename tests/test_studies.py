"""The studies: points are measured once, pages say what the CSVs say, and figures are drawn from them without a GPU."""

import re
import shutil
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from small_doge.models import config_for

ROOT = Path(__file__).parents[1]
EXPERIMENTS, PAGES = ROOT / "experiments", ROOT / "docs" / "studies"
sys.path[:0] = [str(EXPERIMENTS), str(ROOT / "benchmarks")]
import against_llama  # noqa: E402
import experts_quality  # noqa: E402
import long_context  # noqa: E402
import points  # noqa: E402
import recall_study  # noqa: E402
import schedule  # noqa: E402
import stream_gradient  # noqa: E402
import stream_loss  # noqa: E402

STUDIES = (against_llama, experts_quality, long_context, recall_study, schedule, stream_gradient, stream_loss)


def measure(point):
    if point["x"] == 2:
        raise RuntimeError("two cannot be measured")
    return [{"y": point["x"] ** 2}, {"y": point["x"] ** 3}]


def test_points_that_are_there_are_not_measured_again_and_failures_are_left_out(tmp_path, capsys):
    args = SimpleNamespace(output=tmp_path / "study.csv", workers=1, minutes=None)
    rows = points.run([{"x": 2, "z": "a"}, {"x": 3, "z": "a"}], measure, args)
    assert [(row["x"], row["y"]) for row in rows] == [("3", "9"), ("3", "27")]
    assert "{'x': 2, 'z': 'a'} failed" in capsys.readouterr().out
    rows = points.run([{"x": 3, "z": "a"}, {"x": 4, "z": "a"}], measure, args)
    assert [row["y"] for row in rows] == ["9", "27", "16", "64"]
    assert "2 points, 1 of them in" in capsys.readouterr().out
    assert points.run([{"x": 3, "z": "b"}], measure, args)[-1]["z"] == "b"


def test_no_point_begins_that_would_end_too_late(tmp_path):
    args = SimpleNamespace(output=tmp_path / "study.csv", workers=1, minutes=-1)
    assert points.run([{"x": 3}], measure, args) == []


DRAWN = [(study, path) for study in STUDIES for path in sorted(EXPERIMENTS.glob(f"{study.__name__}*.csv"))]


@pytest.mark.parametrize(("study", "there"), DRAWN, ids=[path.stem for _, path in DRAWN])
def test_figures_are_drawn_from_the_csv(study, there, tmp_path, monkeypatch, capsys):
    shutil.copyfile(there, tmp_path / there.name)
    monkeypatch.setattr(sys, "argv", [study.__name__, "--draw", "--output", str(tmp_path / there.name)])
    monkeypatch.setattr(study, "measured" if study is recall_study else "measure", None)
    study.main()
    assert (tmp_path / there.with_suffix(".png").name).stat().st_size > 10_000
    assert len(capsys.readouterr().out.splitlines()) >= 2


def cells(page, *first):
    """The rows of a page's tables whose first cell begins with one of some words: numbers, None, or lists of them."""
    lines = [line.replace("**", "") for line in (PAGES / page).read_text("utf-8").splitlines() if line.startswith("|")]
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    asked = [row[1:] for word in first for row in found if f"{row[0]} |".startswith(word)]
    return [[number(cell) for cell in row] for row in asked]


def number(cell):
    if ", " in cell:
        return [number(part) for part in cell.split(", ")]
    return float(re.sub(r" ?(M|MiB|ms)$", "", cell)) if cell else None


def test_the_page_on_recall_has_the_figures_of_the_csv():
    rows = points.read_csv(EXPERIMENTS / "recall_study.csv")
    said = cells(
        "recall.md", "full", "the 512", "DMA, the 512", "DMA, and", "sliding window of 512", "Mamba-2", "Based"
    )
    mixers = ("full", "query_topk", "dma", "dma_local", "sliding", "ssd", "based")
    for mixer, numbers in zip(mixers, said, strict=True):
        window = recall_study.window_of(mixer, 512, [2048])
        measured = [recall_study.best(rows, mixer, width, window, 2048)[0] for width in (32, 64, 128, 256)]
        assert numbers == pytest.approx(measured, abs=0.0051), mixer
    mixers = {
        "full attention": "full", "DMA |": "dma", "DMA, with the last": "dma_local", "DMA, with scores": "dma_aged",
        "sliding window": "sliding", "Mamba-2 (SSD)": "ssd", "Based": "based",
    }  # fmt: skip
    for words, mixer in mixers.items():
        for width, said in zip((32, 64, 128, 256), cells("recall.md", f"at 3e-3, {words}")[0], strict=True):
            point = [mixer, width, recall_study.window_of(mixer, 512, [2048]), 3e-3, 2048]
            names = ("hidden_size", "window", "learning_rate", "length")
            mine = [row for row in rows if [row["mixer"], *(float(row[name]) for name in names)] == point]
            measured = [float(row["accuracy"]) for row in sorted(mine, key=lambda row: row["seed"])]
            assert (said if isinstance(said, list) else [said]) == pytest.approx(measured, abs=0.0051), (words, width)
    windows = (64, 128, 256, 512, 1024, 2048)
    for mixer, numbers in zip(
        ("dma", "sliding"), cells("recall.md", "DMA, filler", "sliding window of w"), strict=True
    ):
        measured = [recall_study.best(rows, mixer, 64, window, 2048)[0] for window in windows]
        assert numbers == pytest.approx(measured, abs=0.0051), mixer


def test_the_pages_on_llama_and_experts_have_the_figures_of_the_csvs():
    ends = against_llama.ends(points.read_csv(EXPERIMENTS / "against_llama.csv"))
    swept = {
        "5e-4": ("20m", 100, 5e-4), "1e-3": ("20m", 100, 1e-3), "2e-3": ("20m", 100, 2e-3), "4e-3": ("20m", 100, 4e-3),
        "8e-3": ("20m", 100, 8e-3), "at 1e-3, with": ("20m", 200, 1e-3), "at 2e-3, with": ("20m", 200, 2e-3),
        "at 4e-3, with": ("20m", 200, 4e-3), "rate 5e-4": ("60m", 100, 5e-4),
        "rate 1e-3": ("60m", 100, 1e-3), "rate 2e-3": ("60m", 100, 2e-3), "rate 4e-3": ("60m", 100, 4e-3),
    }  # fmt: skip
    for words, (size, warmup, rate) in swept.items():
        (*bits, seeds) = cells("against_llama.md", words)[0]
        measured = [ends[size, kind, warmup, rate] for kind in ("doge", "llama")]
        assert bits == pytest.approx([statistics.fmean(values) for values in measured], abs=5.1e-4), words
        assert [len(values) for values in measured] == (seeds if isinstance(seeds, list) else [seeds, seeds]), words
    parts = {
        "nothing": "doge", "the score": "no bias", "residual weights": "no residual weights",
        "q and k norm": "no q/k norm", "documents kept": "documents together", "all of these": against_llama.NONE,
        "three quarters": "window 512",
    }  # fmt: skip
    for words, kind in parts.items():
        columns = ((100, 1e-3), (100, 2e-3), (200, 2e-3))
        for bits, (warmup, rate) in zip(cells("against_llama.md", words)[0], columns, strict=True):
            measured = ends.get(("20m", kind, warmup, rate))
            assert (bits is None) == (measured is None), words
            assert measured is None or bits == pytest.approx(statistics.fmean(measured), abs=5.1e-4), words
    last = experts_quality.last(points.read_csv(EXPERIMENTS / "experts_quality.csv"))
    said = cells("experts.md", "dense 20m", "top-k mixture", "CDMoE:", "dense, stopped", "the same, grown")
    kinds = ("dense", "top-k MoE", "CDMoE", "dense, twice", "CDMoE, grown")
    for kind, (total, active, loss) in zip(kinds, said, strict=True):
        rows = last[kind, 1e-3]
        assert total == pytest.approx(int(rows[0]["parameters"]) / 1e6, abs=0.06)
        assert active == pytest.approx(int(rows[0]["active_parameters"]) / 1e6, abs=0.06)
        assert loss == pytest.approx(statistics.fmean(float(row["eval_loss"]) for row in rows), abs=6e-4)
        assert len(rows) == 2


def test_the_page_on_long_contexts_has_the_figures_of_the_csvs():
    def found(name, key, measure):
        kinds = long_context.by_kind(points.read_csv(EXPERIMENTS / name))
        return [*long_context.means(kinds[key], measure, lambda row: float(row["position_from"] or 0)).values()]

    longest = 32768
    kinds = {
        "full attention": ("full", longest, 0, 0), "sliding window of 1,024": ("window", 1024, 0, 0),
        "sliding window of 2,048": ("window", 2048, 0, 0), "DMA as published, w": ("dma", 1024, 0, 0),
        "DMA, w = 1,024, lifetime": ("dma", 1024, 0, longest), "DMA, w = 512": ("dma", 512, 512, 0),
        "DMA, w = 1,024, and": ("dma", 1024, 1024, 0),
    }  # fmt: skip
    for words, key in kinds.items():
        held_out, first, late, ms, mib = cells("long_context.md", words)[0]
        positions = found("long_context.csv", key, "loss_by_position")
        assert [held_out] == pytest.approx(found("long_context.csv", key, "eval_loss"), abs=6e-4)
        assert [first, late] == pytest.approx([positions[0], positions[-1]], abs=6e-4)
        rows = long_context.by_kind(points.read_csv(EXPERIMENTS / "long_context.csv"))[key]
        at_end = {row["measure"]: float(row["value"]) for row in rows if row["length"] == str(longest)}
        assert [ms, mib] == pytest.approx([at_end["forward_ms"], at_end["cache_bytes"] / 2**20], abs=0.51)
    led = long_context.by_kind(points.read_csv(EXPERIMENTS / "long_context_stages.csv"))
    for words, key in {
        "full": kinds["full attention"], "sliding 1,024": ("window", 1024, 0, 0), "DMA 512": ("dma", 512, 0, longest),
        "DMA 1,024": ("dma", 1024, 0, longest), "DMA 2,048": ("dma", 2048, 0, longest),
        "DMA 1,024, 10": ("dma", 1024, 0, 10 * longest), "DMA 512 + 512 |": ("dma", 512, 512, 0),
        "DMA 512 + 512, 100": ("dma", 512, 512, 100 * longest),
    }.items():  # fmt: skip
        (*recalled, loss) = cells("long_context.md", f"needles, {words}")[0]
        texts = [row for row in led[key] if row["length"] == "4096"]
        measured = long_context.means(texts, "needle", lambda row: float(row["depth"]))
        assert recalled == pytest.approx([*measured.values()], abs=0.0051), words
        losses = [float(row["value"]) for row in led[key] if row["measure"] == "eval_loss"]
        assert loss == pytest.approx(statistics.fmean(losses), abs=6e-4), words
        assert len(losses) == (2 if words == "DMA 1,024" else 1), words
    small = {
        "full attention": ("full", 1024, 0, 0), "sliding window of 64": ("window", 64, 0, 0),
        "DMA as published": ("dma", 64, 0, 0), "DMA, lifetime 1,024": ("dma", 64, 0, 1024),
        "DMA, lifetime 10,000": ("dma", 64, 0, 10000), "DMA of 32, and the last 32 |": ("dma", 32, 32, 0),
        "DMA of 32, and the last 32, lifetime": ("dma", 32, 32, 1024),
    }  # fmt: skip
    kinds = long_context.by_kind(points.read_csv(EXPERIMENTS / "long_context_cpu.csv"))
    for words, key in small.items():
        loss, seeds = cells("long_context.md", words)[-1]
        measured = [float(row["value"]) for row in kinds[key] if row["measure"] == "eval_loss"]
        assert loss == pytest.approx(statistics.fmean(measured), abs=6e-4), words
        assert seeds == len(measured), words


def test_the_page_on_the_schedule_has_the_figures_of_the_csv():
    for name, lengths, first in (("schedule", (100, 200, 400), ""), ("schedule_20m", (200, 400, 800), "20m, ")):
        rows = points.read_csv(EXPERIMENTS / f"{name}.csv")
        for kind in (schedule.WSD, schedule.COSINE):
            measured = [float(schedule.one(rows, kind, steps, "233")[-1]["eval_loss"]) for steps in lengths]
            assert cells("schedule.md", first + kind)[0] == pytest.approx(measured, abs=6e-4), (name, kind)
        for kind in schedule.GOING_ON:
            (*said, jump) = cells("schedule.md", first + kind)[0]
            mine = schedule.one(rows, kind, lengths[-1], "233")
            highest = max(float(row["loss"]) for row in mine if 1 < int(row["step"]) - lengths[-1] <= 41)
            measured = [float(mine[-1]["new_eval_loss"]), float(mine[-1]["eval_loss"]), highest]
            assert said == pytest.approx(measured, abs=6e-4), (name, kind)
            assert jump == pytest.approx(schedule.jump(mine, lengths[-1])[0], abs=0.051), (name, kind)


def test_the_top_k_mixture_is_the_sum_of_the_chosen_experts():
    config = config_for("tiny", is_moe=True, num_experts=16, num_experts_per_tok=2)
    torch.manual_seed(0)
    layer, x = experts_quality.TopK(config).double(), torch.randn(2, 5, config.hidden_size, dtype=torch.float64)
    out, logits, loss = layer(x, balanced=True)
    width, chosen = layer.width, np.zeros(experts_quality.EXPERTS)
    for token, mine, scores in zip(x.flatten(0, 1), out.flatten(0, 1), logits, strict=True):
        p, expected = scores.softmax(-1), 0
        best = p.topk(experts_quality.CHOSEN).indices.tolist()
        for e in best:
            part = slice(e * width, (e + 1) * width)
            hidden = F.silu(layer.gate_proj.weight[part] @ token) * (layer.up_proj.weight[part] @ token)
            expected = expected + p[e] / p[best].sum() * (layer.down_proj.weight[:, part] @ hidden)
            chosen[e] += 1
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)  # the router's softmax is in float32
    share = torch.from_numpy(chosen / chosen.sum())
    torch.testing.assert_close(
        loss.double(), experts_quality.EXPERTS * (share * logits.softmax(-1).mean(0)).sum(), rtol=1e-5, atol=0
    )


def test_rows_of_a_new_text_come_after_those_of_the_old_one():
    old, new = [{"text": i} for i in range(5)], [{"text": 100 + i} for i in range(3)]
    rows = [row["text"] for row in schedule.Then([(old, 10), (new, 3)], seed=1)]
    assert sorted(rows[:5]) == sorted(rows[5:10]) == [0, 1, 2, 3, 4]  # two epochs in one order
    assert sorted(rows[10:]) == [100, 101, 102]


def test_a_jump_is_told_from_a_slope():
    falling = [{"step": str(i), "loss": str(5 - 0.01 * i + 0.01 * (i % 2))} for i in range(1, 101)]
    spiked = [row | {"loss": "5.5"} if row["step"] == "60" else row for row in falling]
    assert schedule.jump(falling, 30)[0] < 0
    assert schedule.jump(spiked, 30)[0] > 10


def test_every_page_says_first_whether_the_claim_held_and_what_was_not_tested():
    for page in sorted(PAGES.glob("*.md")):
        if page.stem != "index":
            first = page.read_text("utf-8").split("\n\n")[1]
            assert re.search(r"\bheld\b", first), page
            assert "Not tested" in first, page
