import base64
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch

from small_doge import DogeConfig, DogeForCausalLM
from small_doge.report import plots

HISTORY = [
    {"step": 1, "loss": 9.0, "bits_per_byte": 3.9, "learning_rate": 1e-3},
    {"step": 2, "loss": float("nan"), "learning_rate": 2e-3},
    {"step": 3, "loss": 6.5, "bits_per_byte": 2.9, "learning_rate": 1e-3},
    {"step": 3, "eval_loss": 6.7, "eval_bits_per_byte": 3.0},
]


WATCHED = [
    {"step": 2 * i, "grad_norm": 1 / (i + 1)}
    | {f"{name}/layer_{n}": 0.1 * i * (n + 1) for n in range(3) for name in ("A", "score_spread", "seen_distance")}
    for i in range(4)
]


@pytest.mark.parametrize(
    "figure",
    [
        lambda: plots.loss_figure(HISTORY),
        lambda: plots.loss_figure([]),
        lambda: plots.bits_per_byte_figure(HISTORY),
        lambda: plots.learning_rate_figure(HISTORY),
        lambda: plots.balance_loss_figure([{"step": 1, "balance_loss": 1.5}, {"step": 2, "balance_loss": 1.1}]),
        lambda: plots.watching_figure(WATCHED),
        lambda: plots.watching_figure([{"step": 1, "grad_norm": 0.5}]),
        lambda: plots.expert_use_figure(np.array([[0, 0, 0, 7], [5, 5, 5, 5], [1, 2, 3, 4]])),
        lambda: plots.expert_use_figure(np.arange(1, 1025)[None]),
        lambda: plots.comparison_figure({"model": 2.1, "xz -9": 1.7}),
        lambda: plots.stage_time_figure({"Train": 300.0, "Evaluate": 2.0}),
        lambda: plots.stage_time_figure({}),
        lambda: plots.attention_figure(np.tril(np.full((3, 3), 0.3)), np.ones(3), ["$x$", "<b>--", "\U0001f436"], "$t"),
    ],
)
def test_every_picture_is_a_whole_svg_and_png(figure):
    svg = plots.to_svg(figure())
    root = ET.fromstring(svg)  # noqa: S314 - our own
    assert root.tag.endswith("svg")
    assert "<!--" not in svg
    assert "metadata" not in svg
    png = base64.b64decode(plots.to_png_base64(figure(), dpi=40))
    assert png.startswith(b"\x89PNG")
    assert len(png) > 1000


def test_pictures_are_the_same_each_time():
    assert plots.to_svg(plots.loss_figure(HISTORY)) == plots.to_svg(plots.loss_figure(HISTORY))


def test_series_leaves_out_what_is_no_number():
    assert plots.series(HISTORY, "loss") == ([1.0, 3.0], [9.0, 6.5])
    assert plots.series(HISTORY, "mfu") == ([], [])


def test_the_picture_of_experts_is_their_sorted_use():
    counts = np.array([[3, 0, 9, 0], [1, 1, 1, 1]])
    first, second = plots.expert_use_figure(counts).axes[:2]
    assert first.get_title(loc="left") == "Layer 1: 50.0 % never chosen"
    assert second.get_title(loc="left") == "Layer 2: 0 % never chosen"
    assert first.get_yscale() == "log"
    even, curve = first.lines
    assert set(even.get_ydata()) == {1}
    assert curve.get_xdata().tolist() == [12.5, 37.5]  # the middle of each quarter
    assert curve.get_ydata().tolist() == [3.0, 1.0]  # even use is 3
    low, high = first.get_ylim()
    assert low < 1 < 3 < high


def test_a_picture_of_many_experts_keeps_both_ends():
    counts = np.random.default_rng(0).poisson(2, (1, 16384))
    _, curve = plots.expert_use_figure(counts).axes[0].lines
    assert len(curve.get_xdata()) <= 300
    used = (counts > 0).sum()
    assert curve.get_xdata()[-1] == pytest.approx(100 * (used - 0.5) / 16384)
    assert curve.get_ydata()[[0, -1]] == pytest.approx([counts.max() / counts.mean(), 1 / counts.mean()])


def test_a_small_share_is_not_called_none():
    shares = (0, 0.0001, 0.079, 0.99999, 1)
    assert [plots.percent(x) for x in shares] == ["0 %", "< 0.1 %", "7.9 %", "> 99.9 %", "100.0 %"]


def test_attention_and_scores_are_those_of_the_formulas():
    torch.manual_seed(0)
    config = DogeConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        keep_window_size=5,
    )
    model = DogeForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.A.copy_(torch.tensor([0.7, -0.4]))
            layer.self_attn.dt_proj.weight.normal_()
    attentions, scores = plots.attention_and_scores(model, torch.arange(12)[None])
    assert [a.shape for a in attentions] == [(4, 12, 12)] * 2
    assert [s.shape for s in scores] == [(2, 12)] * 2
    for attention, score in zip(attentions, scores, strict=True):
        np.testing.assert_allclose(attention.sum(-1), 1, rtol=1e-5)
        # Each query reads the 5 keys of largest score so far, which its two heads of a group have in common.
        for query in range(12):
            for head in range(4):
                kept = np.argsort(score[head // 2, : query + 1])[-5:]
                assert set(np.flatnonzero(attention[head, query])) == set(kept)
    assert not model.model.layers[0].self_attn.dt_proj._forward_hooks


def test_what_was_watched_has_a_panel_each_and_a_curve_for_every_layer():
    figure = plots.watching_figure(WATCHED)
    drawn = {axes.get_ylabel(): len(axes.lines) for axes in figure.axes if axes.axison}
    assert drawn == {"gradient norm": 1, "mean |A|": 3, "spread of the scores": 3, "distance seen, tokens": 3}
    assert list(figure.axes[1].lines[2].get_ydata()) == pytest.approx([0, 0.3, 0.6, 0.9])
    assert plots.watching_figure([{"step": 1, "loss": 3.0}]) is None
    assert [words.get_text() for words in figure.legends[0].get_texts()] == ["first layer", "last layer"]
    figure.draw_without_rendering()
    assert not any(axes.bbox.overlaps(figure.legends[0].get_window_extent()) for axes in figure.axes)


def test_attention_to_the_default_sentence_is_as_wide_as_the_other_pictures():
    T = 24
    figure = plots.attention_figure(np.tril(np.full((T, T), 0.1)), np.ones(T), ["twelve_chars"] * T, "a head")
    assert figure.get_figwidth() == plots.WIDTH
