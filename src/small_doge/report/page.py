"""The report stage: one HTML file that tells what a run did, for people who have never trained a model.

The file needs nothing but itself: no script, no request, pictures inside. Text from the model is untrusted, so every
value goes through :func:`text`, and the page forbids scripts and requests to itself besides.
"""

from __future__ import annotations

import base64
import json
import os
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..evaluation.picture import scores_figure
from ..evaluation.results_table import notes, table_rows
from . import plots
from .answers import answers_section
from .markup import table, text
from .run import OPTIONAL, STAGES, Run, numbers, read_run, size, summary, verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SENTENCE = """\
def area(width, height):
    return width * height

print(area(width, height))
"""
MOST_TOKENS = 44  # more labels than this cannot be read on one picture

CSS = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5a6068; --page: #fdfdfc; --line: #dcdfe3; --box: #f3f4f6; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ea; --soft: #a2a9b2; --page: #16181b; --line: #363b42; --box: #212429; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 62rem; background: var(--page); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .8rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; padding-top: .6rem; border-top: 1px solid var(--line); }
p { max-width: 46rem; overflow-wrap: anywhere; } p.lead { font-size: 1.08rem; }
.soft { color: var(--soft); font-size: .93rem; }
table { border-collapse: collapse; width: 100%; max-width: 46rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line);
  overflow-wrap: anywhere; }
.wide td { overflow-wrap: normal; }
th { font-weight: 500; color: var(--soft); width: 45%; }
.columns th { width: auto; overflow-wrap: normal; }
td { font-variant-numeric: tabular-nums; } .answers td + td { white-space: nowrap; }
figure { margin: 1rem 0; } figcaption { max-width: 46rem; color: var(--soft); font-size: .93rem; margin-top: .5rem; }
img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 6px; padding: 4px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: .8rem; }
.pair > * { min-width: 0; }
.wide { overflow-x: auto; }
pre { background: var(--box); border-radius: 6px; padding: .7rem .8rem; margin: .3rem 0; overflow-x: auto;
  white-space: pre-wrap; overflow-wrap: anywhere; font: .86rem/1.45 ui-monospace, Consolas, Menlo, monospace; }
pre b { color: var(--soft); font-weight: 600; } summary { cursor: pointer; }
"""


@dataclass
class ReportRecipe:
    """Which run to report on, and where to."""

    run_dir: str = field(metadata={"help": "folder of the run: tokenizer/, data/, pretrain/ and evaluation/ in it"})
    output: str | None = field(default=None, metadata={"help": "the HTML file (default: report.html in run_dir)"})
    sentence: str = field(
        default=SENTENCE, metadata={"help": "text for the picture of attention; words that come twice show most"}
    )


def report(recipe: ReportRecipe) -> Path:
    """Write the report of a run as one HTML file, its pictures also to ``run_dir/figures``, and print a summary.

    Needs ``run_dir/pretrain``; what else is missing the report says.

    Returns:
        The path of the HTML file.

    Raises:
        UserError: if there is no finished pretraining in ``run_dir``, or one of its files cannot be read.
    """
    run = read_run(recipe.run_dir)
    output = Path(recipe.output) if recipe.output else run.folder / "report.html"
    if output.is_dir():
        raise UserError(f"output {output} is a folder, expected the name of an HTML file")
    figures, attention_note = _figures(run, recipe.sentence)
    page = render(run, figures, attention_note)

    (run.folder / "figures").mkdir(exist_ok=True)
    for name, figure in figures.items():
        _replace(run.folder / "figures" / f"{name}.png", plots.to_png(figure))
    output.parent.mkdir(parents=True, exist_ok=True)
    _replace(output, page.encode("utf-8", errors="replace"))
    print("\n".join(f"{name}: {value}" for name, value in numbers(run)))
    print(verdict(run))
    print(f"wrote {output} and {len(figures)} pictures to {run.folder / 'figures'}")
    return output


def _figures(run: Run, sentence: str) -> tuple[dict[str, Figure], str]:
    """All pictures by file name, and the words that belong under those of attention (or why there are none)."""
    times = {
        label: run.stages[name]["seconds"] for name, label in STAGES.items() if "seconds" in run.stages.get(name, {})
    }
    figures = {"stage_times": plots.stage_time_figure(times), "loss": plots.loss_figure(run.history)}
    figures["bits_per_byte"] = plots.bits_per_byte_figure(run.history)
    figures["learning_rate"] = plots.learning_rate_figure(run.history)
    if run.results:
        figures["comparison"] = plots.comparison_figure(run.results["bits_per_byte"])
    if run.expert_counts is not None:
        figures["expert_use"] = plots.expert_use_figure(run.expert_counts)
    if any("balance_loss" in entry for entry in run.history):
        figures["balance_loss"] = plots.balance_loss_figure(run.history)
    watched = plots.watching_figure(run.history)
    if watched is not None:
        figures["watching"] = watched
    for number, results in enumerate(run.suites.values(), 1):
        figures[f"scores_{number}"] = scores_figure(results, [])
    try:
        pictures, note = attention_pictures(run.folder / "pretrain", sentence)
    except UserError as error:
        return figures, f"No picture of attention: {error}."
    return {**figures, **pictures}, note


def attention_pictures(folder: Path, sentence: str) -> tuple[dict[str, Figure], str]:
    """Pictures of a head of the first layer and one of the last reading ``sentence``, and their caption.

    Of each layer the head is taken whose scores differ most.

    Raises:
        UserError: if the model or its tokenizer cannot be opened, or the sentence is empty.
    """
    import torch

    from ..data.tokenizer import encode_text, load_tokenizer
    from ..models import load_model

    tokenizer, model = load_tokenizer(folder), load_model(folder)
    ids = encode_text(tokenizer, [sentence])[0]
    if not ids:
        raise UserError("the sentence for the picture of attention is empty")
    if tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id, *ids]
    cut = len(ids) > MOST_TOKENS
    ids = ids[:MOST_TOKENS]
    labels = [_label(str(tokenizer.decode([i]))) for i in ids]
    attentions, scores = plots.attention_and_scores(model, torch.tensor([ids], device=model.device))

    figures = {}
    for layer in sorted({0, len(scores) - 1}):
        group = int((scores[layer].max(1) - scores[layer].min(1)).argmax())
        head = group * len(attentions[layer]) // len(scores[layer])
        title = f"Layer {layer + 1} of {len(scores)}, head {head + 1} of {len(attentions[layer])}"
        figures[f"attention_layer_{layer + 1}"] = plots.attention_figure(
            attentions[layer][head], scores[layer][group], labels, title
        )
    window = model.config.keep_window_size
    note = (
        "Each row is a token that reads (the query), each column a token that is read (the key); a row sums to 1. "
        "The strip above is the score s that Dynamic Mask Attention gives to each key, made from the key's own value. "
        "It is added to the match of query and key, so a key with a higher score is read more by everyone. It also "
        f"decides what stays in sight: of all tokens so far a query sees the {window:,} keys with the largest score, "
        "the newer one on a tie. "
    )
    if model.config.score_lifetime:
        note += f"A score higher by 1 makes up for {model.config.score_lifetime:g} tokens of age. "
    if len(ids) <= window:
        note += f"This text has {len(ids)} tokens, so here the window keeps every key, and only the future is white."
    else:
        note += f"White cells are the future and what the window, smaller than these {len(ids)} tokens, has let go."
    note += " Untrained scores are all 1. Of each layer the head is shown whose scores differ most."
    if cut:
        note += f" Only the first {MOST_TOKENS} tokens are shown."
    return figures, note


def _label(token: str) -> str:
    """A token as a short label on which white space can be seen."""
    seen = token.replace(" ", "\u2423").replace("\n", "\u23ce").replace("\t", "\u21e5")
    seen = "".join(c if c.isprintable() else "\ufffd" for c in seen)
    return seen if len(seen) <= 12 else seen[:11] + "\u2026"


def render(run: Run, figures: dict[str, Figure], attention_note: str) -> str:
    """The whole page."""
    alt = {
        "stage_times": "How long each stage took",
        "loss": "Loss against the training step",
        "bits_per_byte": "Bits per byte against the training step",
        "learning_rate": "Learning rate against the training step",
        "comparison": "Bits per byte of the model and of the baselines",
        "expert_use": "How often each expert of each layer was chosen, the most used first, and how many never were",
        "balance_loss": "Balance loss of the experts against the training step",
        "watching": "Norm of the gradient, and what attention keeps in each layer, against the training step",
        **{name: "Score of each task, with what guessing gives" for name in figures if name.startswith("scores")},
    }

    def picture(name: str, svg: bool = True) -> str:
        if svg:
            kind, data = "svg+xml", base64.b64encode(plots.to_svg(figures[name]).encode("utf-8")).decode("ascii")
        else:
            kind, data = "png", plots.to_png_base64(figures[name])
        words = alt.get(name, "Attention probabilities and scores of the keys, " + name.replace("_", " "))
        return f'<img alt="{text(words)}" src="data:image/{kind};base64,{data}">'

    attention = [picture(name, svg=False) for name in figures if name.startswith("attention")]
    if run.results:
        comparison = f"<figure>{picture('comparison')}<figcaption>{text(_comparison_words(run))}</figcaption></figure>"
    else:
        comparison = "<p>The model has not been evaluated: there is no evaluation/results.json in this run.</p>"
    sections = [
        ("Numbers", table(numbers(run))),
        ("Time", f"<figure>{picture('stage_times')}</figure>"),
        (
            "Training",
            f"<figure><div class='pair'>{picture('loss')}{picture('bits_per_byte')}{picture('learning_rate')}</div>"
            "<figcaption>The loss is how surprised the model is by the next token, on average; bits per byte says the "
            "same for each byte of text, so it does not depend on how text is cut into tokens. When the held-out curve "
            "rises while the training curve falls, the model learns by heart.</figcaption></figure>"
            + _watched(figures, picture),
        ),
        ("Beside a compressor and counting", comparison),
        *([("Questions with known answers", _suites(run, picture))] if run.suites else []),
        *([("Experts", _experts(run, figures, picture))] if run.config.get("is_moe") else []),
        ("Attention", f"{''.join(attention)}<p class='soft'>{text(attention_note)}</p>"),
        ("What it writes", _completions(run.samples)),
        *([("What it answers", answers_section(run.answers))] if run.answers else []),
        ("Try it", _commands(run)),
        ("Settings and versions", _settings(run)),
    ]
    body = "\n".join(f"<section><h2>{text(title)}</h2>{content}</section>" for title, content in sections)
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{text(run.folder.name)}: a Small Doge run</title>
<style>{CSS}</style>
</head>
<body>
<h1>Small Doge run: {text(run.folder.absolute().name)}</h1>
<p class="lead">{text(summary(run))}</p>
{body}
</body>
</html>
"""


def _watched(figures: dict[str, Figure], picture: Callable[[str], str]) -> str:
    """What was watched beside the loss, if anything was."""
    if "watching" not in figures:
        return ""
    words = (
        "A gradient norm that jumps announces a loss that does. The other curves are one for each layer, the first "
        "dark: A is where Dynamic Mask Attention departs from a sliding window, the spread of the scores is how much "
        "it prefers some keys, and once texts are longer than the window, keys leave before their document ends."
    )
    return f"<figure>{picture('watching')}<figcaption>{text(words)}</figcaption></figure>"


def _experts(run: Run, figures: dict[str, Figure], picture: Callable[[str], str]) -> str:
    """How evenly the experts are used: on held-out text a picture and a table, in training the balance loss."""
    E, k = run.config["num_experts"], run.config["num_experts_per_tok"]
    parts = [
        f"<p>In each layer stand {E:,} small experts, and a router sends every token to {k} of them. An expert that is "
        "never chosen is memory that does nothing; one that is chosen for everything learns nothing in particular.</p>"
    ]
    use = run.results.get("expert_use")
    if use and "expert_use" in figures:
        even = use["tokens"] * k / E
        words = (
            "Each panel is a layer, its experts in order, the most used first. At 1× an expert is chosen as often as "
            f"if all were used evenly: {even:,.1f} times in the {use['tokens']:,} tokens of held-out text. Each "
            "step up the upright axis multiplies by the same number. The shaded experts were not chosen once; other "
            "text may still need them."
        )
        parts.append(f"<figure>{picture('expert_use')}<figcaption>{text(words)}</figcaption></figure>")
        parts.append(_experts_table(use["layers"]))
        parts.append(
            "<p class='soft'>Most used: how often the busiest expert was chosen, against even use. Spread as over: "
            "how many experts, used evenly, would spread the tokens as wide (e to the power of the entropy), at best "
            f"{E:,}.</p>"
        )
    else:
        parts.append("<p>Their use has not been measured: <code>doge evaluate</code> on this model does.</p>")
    if "balance_loss" in figures:
        words = (
            "The balance loss pulls the router towards even use, where it is 1; the more tokens crowd on few experts, "
            f"the larger it is. {run.config['router_aux_loss_coef']:g} times the mean of the layers is part of the "
            "training loss above; held-out loss and bits per byte are without it."
        )
        parts.append(f"<figure>{picture('balance_loss')}<figcaption>{text(words)}</figcaption></figure>")
    return "".join(parts)


def _experts_table(layers: list[dict[str, float]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("Layer", "Never chosen", "Most used", "Spread as over"))
    rows = "".join(
        f"<tr><td>{number}</td><td>{text(plots.percent(layer['dead_share']))}</td><td>{layer['largest']:.1f}×</td>"
        f"<td>{layer['effective_experts']:,.0f}</td></tr>"
        for number, layer in enumerate(layers, 1)
    )
    return f"<table class='columns'><tr>{head}</tr>{rows}</table>"


def _suites(run: Run, picture: Callable[[str], str]) -> str:
    """For each suite that was run: its picture, its table and what has to stand beside it."""
    parts = []
    for number, (folder, results) in enumerate(run.suites.items(), 1):
        head, *rows = table_rows(results, [])
        # A column for each model reads better on a narrow page than one for each task.
        cells = zip(head, *rows, strict=True)
        body = "".join("<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>" for row in cells)
        items = "".join(f"<li>{text(note)}</li>" for note in notes(results))
        parts.append(
            f"<h3>{text(folder)}</h3><figure>{picture(f'scores_{number}')}</figure>"
            f"<div class='wide'><table>{body}</table></div><ul class='soft'>{items}</ul>"
        )
    return "".join(parts)


def _comparison_words(run: Run) -> str:
    words = (
        "Bits needed for each byte of held-out text, by the model and by simpler means. xz -9 is a general compressor; "
        "after the training text it may copy from all of that. The n-gram model counts which byte follows which few "
        "bytes in the training text. Neither pays for marking where a document ends; the model does."
    )
    used, whole = (
        run.results.get("baseline_training_bytes"),
        run.manifest.get("splits", {}).get("train", {}).get("bytes"),
    )
    if used and whole and used < whole:
        words += f" They learned from the first {size(used)} of {size(whole)} of training text."
    return words


def _completions(samples: list[dict[str, Any]]) -> str:
    """For each prompt its first and its last completion, side by side."""
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for sample in samples:
        if isinstance(sample, dict) and {"step", "prompt", "completion"} <= sample.keys():
            by_prompt.setdefault(str(sample["prompt"]), []).append(sample)
    if not by_prompt:
        return "<p>This run wrote no samples while it trained.</p>"
    parts = ['<p class="soft">The prompt is grey; the rest is the model\'s, early and late in training.</p>']
    for taken in by_prompt.values():
        taken.sort(key=lambda sample: sample["step"])
        cells = []
        for sample in taken if len(taken) == 1 else (taken[0], taken[-1]):
            seen = f" ({sample['tokens']:,} tokens read)" if isinstance(sample.get("tokens"), int) else ""
            cells.append(
                f'<div><span class="soft">step {text(sample["step"])}{text(seen)}</span>'
                f"<pre><b>{text(sample['prompt'])}</b>{text(sample['completion'])}</pre></div>"
            )
        parts.append(f'<div class="pair">{"".join(cells)}</div>')
    return "".join(parts)


def _commands(run: Run) -> str:
    def command(stage: str, folder: str, rest: str) -> str:
        model = str(run.folder / folder)
        quoted = f'"{model}"' if re.search(r"[^\w./\\:-]", model) else model
        return f"<pre>{text(f'doge {stage} --model {quoted}{rest}')}</pre>"

    completing = command("generate", "pretrain", ' --prompt "def area(width, height):"')
    said = f"<p>Let the model go on from a text of yours:</p>{completing}"
    taught = [name for name in ("dpo", "sft") if name in run.stages]
    return said + (f"<p>Ask the one that answers:</p>{command('chat', taught[0], '')}" if taught else "")


def _settings(run: Run) -> str:
    parts = []
    for name, label in STAGES.items():
        stage = run.stages.get(name)
        if stage is None and name in OPTIONAL:
            continue
        if stage is None:
            parts.append(f"<p>{text(label)}: not in this run.</p>")
            continue
        facts = {k: v for k, v in stage.items() if k not in ("stage", "settings", "versions", "seconds")}
        rows = [(k, json.dumps(v, ensure_ascii=False)) for k, v in {**stage.get("settings", {}), **facts}.items()]
        parts.append(f"<details><summary>{text(label)}</summary>{table(rows)}</details>")
    versions = run.stages["pretrain"].get("versions", {})
    parts.append(f"<details><summary>Versions</summary>{table(list(versions.items()))}</details>")
    config = [(name, json.dumps(value, ensure_ascii=False)) for name, value in run.config.items()]
    parts.append(f"<details><summary>Model configuration</summary>{table(config)}</details>")
    return "".join(parts)


def _replace(path: Path, content: bytes) -> None:
    """Write a file so that it holds either its old content or the new, never a part."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
