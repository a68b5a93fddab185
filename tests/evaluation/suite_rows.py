"""Rows in the schemas of the eight tasks' data sets on the Hub, made up and few, and two tiny models to ask."""

import json
import random

import torch

from small_doge.evaluation.local_tasks import harness_folder

WORDS = "a the red blue old small cat dog tree house river sings sleeps runs near under over with and of".split()
EVALUATED, EXAMPLES = 6, 8
QUESTIONS = {"triviaqa": 3}  # a model with random weights writes all 256 tokens of each answer


def words(rng, count):
    return " ".join(rng.choice(WORDS) for _ in range(count))


def choices(rng, count=4):
    return {"text": [words(rng, rng.randint(1, 5)) for _ in range(count)], "label": list("ABCDE"[:count])}


def mmlu(rng):
    return {"question": words(rng, 8), "choices": choices(rng)["text"], "answer": rng.randrange(4), "subject": "x"}


def triviaqa(rng):
    return {"question": words(rng, 6), "answer": {"value": words(rng, 1), "aliases": [words(rng, 1), words(rng, 2)]}}


def arc(rng):
    count = rng.choice([3, 4, 4, 5])  # as in ARC, where chance is not quite a quarter
    return {
        "id": "0",
        "question": words(rng, 7),
        "choices": choices(rng, count),
        "answerKey": "ABCDE"[rng.randrange(count)],
    }


def piqa(rng):
    return {"goal": words(rng, 6), "sol1": words(rng, 5), "sol2": words(rng, 4), "label": rng.randrange(2)}


def hellaswag(rng):
    endings = [words(rng, 4) + " [step] " + words(rng, 2) for _ in range(4)]
    start = {"ind": rng.randrange(10**6), "activity_label": words(rng, 2), "ctx_a": words(rng, 6), "ctx_b": "he"}
    return start | {"endings": endings, "label": str(rng.randrange(4))}


def openbookqa(rng):
    return {"id": "0", "question_stem": words(rng, 6), "choices": choices(rng), "answerKey": rng.choice("ABCD")}


def winogrande(rng):
    sentence = f"{words(rng, 4)} because _ {words(rng, 4)}."
    return {"sentence": sentence, "option1": words(rng, 2), "option2": words(rng, 1), "answer": rng.choice("12")}


# Of PIQA and HellaSwag there are validation rows only.
TASKS = {
    "triviaqa": (triviaqa, ("train", "validation")),
    "arc_easy": (arc, ("train", "test")),
    "arc_challenge": (arc, ("train", "test")),
    "piqa": (piqa, ("validation",)),
    "hellaswag": (hellaswag, ("validation",)),
    "openbookqa": (openbookqa, ("train", "test")),
    "winogrande": (winogrande, ("train", "validation")),
}


def write_rows(path, make, count, seed):
    rng = random.Random(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(make(rng)) + "\n" for _ in range(count)), encoding="utf-8")


def write_suite(folder):
    """All eight tasks below ``folder``."""
    for name, (make, splits) in TASKS.items():
        for split in splits:
            count = EXAMPLES if split == "train" else QUESTIONS.get(name, EVALUATED)
            write_rows(folder / name / f"{split}.jsonl", make, count, f"{name} {split}")
    for file in sorted((harness_folder() / "mmlu" / "default").glob("mmlu_*.yaml")):
        subject = file.stem.removeprefix("mmlu_")
        for split, count in (("dev", 5), ("test", 1 + (subject == "virology"))):
            write_rows(folder / "mmlu" / subject / f"{split}.jsonl", mmlu, count, f"{subject} {split}")


def write_models(folder):
    """A Doge of ours and transformers' Llama with random weights and one tokenizer, in folders of those names."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from small_doge import DogeConfig, DogeForCausalLM
    from small_doge.data.tokenizer import TokenizerRecipe, train_tokenizer

    rng = random.Random(0)
    corpus = folder / "corpus.txt"
    corpus.write_text("\n\n".join(f"Question: {words(rng, 9)}\nAnswer: {words(rng, 2)}" for _ in range(300)))
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 768}
    sizes |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "initializer_range": 0.3}
    for name, config, model in (
        ("doge", DogeConfig, DogeForCausalLM),
        ("llama", LlamaConfig, LlamaForCausalLM),
    ):
        train_tokenizer(TokenizerRecipe(str(folder / name), corpus=str(corpus), vocab_size=320, validation_fraction=0))
        torch.manual_seed(1)
        model(config(**sizes)).save_pretrained(folder / name)
