"""The model card of an evaluated model, filled from its results: a README.md as the Hub reads it."""

from __future__ import annotations

from typing import Any

from .suites import SUITES, TASKS

# The data sets on the Hub, which the harness names too; a card without them would not be listed under them.
_DATASETS = {
    "mmlu": "cais/mmlu",
    "triviaqa": "mandarjoshi/trivia_qa",
    "arc_easy": "allenai/ai2_arc",
    "arc_challenge": "allenai/ai2_arc",
    "piqa": "baber/piqa",
    "hellaswag": "Rowan/hellaswag",
    "openbookqa": "allenai/openbookqa",
    "winogrande": "allenai/winogrande",
    "ifeval": "google/IFEval",
}
_CONFIGS = {"arc_easy": "ARC-Easy", "arc_challenge": "ARC-Challenge", "winogrande": "winogrande_xl"}


def model_card(results: dict[str, Any], table: str) -> str:
    """The card: metadata with one EvalResult a task, and the table in words."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    found = [
        EvalResult(
            task_type="text-generation",
            dataset_type=_DATASETS[name],
            dataset_name=TASKS[name].title,
            dataset_config=_CONFIGS.get(name),
            dataset_split=TASKS[name].evaluated,
            dataset_args={"num_few_shot": score["num_fewshot"], "questions": score["documents"]},
            metric_type=score["metric"],
            metric_value=round(score["score"], 2),
            metric_name=f"{score['metric']}, percent",
            source_name="lm-evaluation-harness",
            source_url="https://github.com/EleutherAI/lm-evaluation-harness",
        )
        for name, score in results["scores"].items()
    ]
    data = ModelCardData(
        model_name=results["name"],
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["small-doge", results["model_type"]],
        eval_results=found,
    )
    how = "as a chat" if SUITES[results["suite"]].chat else "as plain text"
    return str(
        ModelCard(
            f"---\n{data.to_yaml()}\n---\n\n# {results['name']}\n\n"
            f"A language model of {results['parameters']:,} parameters, evaluated with lm-evaluation-harness {how} "
            f"by Small Doge: `doge evaluate {results['name']} --suite {results['suite']}`.\n\n## Evaluation\n\n{table}"
        )
    )
