"""The part of the page on what the models of a run answer: a table of held-out figures, and the texts."""

from __future__ import annotations

import math
from typing import Any

from .markup import text

NAMES = {"pretrain": "Base", "sft": "SFT", "dpo": "DPO"}
"""What the page calls the model of a folder."""

MOST_CHARACTERS = 240  # of an answer: as long as a docstring can be; a base model goes on and on

_FIGURES = {
    "loss": ("Loss of an answer's token (nats)", "{:.3f}"),
    "ended": ("Answers that end", "{:.0%}"),
    "preference_accuracy": ("Preference accuracy", "{:.1%}"),
    "matched": ("Questions and answers matched", "{:.1%}"),
    "chosen_loss": ("Loss of a chosen answer's token (nats)", "{:.3f}"),
}


def answers_section(found: dict[str, Any]) -> str:
    """``answers.json`` as HTML."""
    figures = found["figures"]
    head = "".join(f"<th>{text(NAMES.get(name, name))}</th>" for name in figures)
    rows = "".join(
        f"<tr><td>{text(words)}</td>"
        + "".join(f"<td>{_number(of.get(name), form)}</td>" for of in figures.values())
        + "</tr>"
        for name, (words, form) in _FIGURES.items()
    )
    words = (
        "The base model only continues text. Supervised fine-tuning (SFT) shows it questions about the standard "
        "library, answered by the first paragraph of a docstring. Direct preference optimisation (DPO) then shows it "
        "pairs of answers, the right docstring and that of a sibling in the same module, and which is the right one. "
        f"Measured on {found['conversations']:,} questions and {found['pairs']:,} pairs about definitions that neither "
        f"stage has seen (pretraining may have, in their files); {found['asked']:,} questions were answered. "
        "Preference accuracy is how often the right docstring is likelier than the sibling's, token for token. Some "
        "docstrings are likelier than others whatever the question; so two questions and their two answers are also "
        "matched: are they likelier as they belong than exchanged? A coin gives 50 % in both."
    )
    return (
        f"<table class='columns answers'><tr><th>On held-out definitions</th>{head}</tr>{rows}</table>"
        f"<p class='soft'>{text(words)}</p>{''.join(map(_asked, found['shown']))}"
    )


def _number(value: Any, form: str) -> str:
    return text(form.format(value)) if isinstance(value, (int, float)) and math.isfinite(value) else "–"


def _asked(item: dict[str, Any]) -> str:
    """A question, what stands in the library, and what each model says, one below the other."""
    cut = {
        name: said if len(said) <= MOST_CHARACTERS else said[:MOST_CHARACTERS] + "…"
        for name, said in item["answers"].items()
    }
    cells = "".join(
        f"<pre><b>{text(NAMES.get(name, name))}: </b>{text(said) or '<b>(nothing)</b>'}</pre>"
        for name, said in cut.items()
    )
    return f"<p><b>{text(item['question'])}</b><br>{text(item['docstring'])}</p>{cells}"
