"""lm-evaluation-harness from inside: its tasks loaded and checked, its answers remembered, one task's score a time.

Imports lm_eval, torch and transformers at once, seconds of import; the command imports this module when it runs.
"""

from __future__ import annotations

import functools
import json
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import LM, hash_args
from lm_eval.tasks import TaskManager
from lm_eval.utils import env as templates

from ..data.tokenizer import load_tokenizer
from ..errors import UserError
from ..models import load_causal_lm
from .likelihood import MAX_GEN_TOKS, HarnessModel
from .local_tasks import LocalTask, harness_folder, write_tasks
from .suites import SuiteTask

logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings tell what we set on purpose
# The harness compiles a task's templates anew for every row. Compiled once, the prompts are the same, and those of
# HellaSwag, five-shot, are written in 3 s instead of 39.
templates.from_string = functools.lru_cache(maxsize=4096)(templates.from_string)


def open_model(
    folder: str, device: str | None, tokens_per_batch: int | None, context_length: int | None, chat: bool
) -> Any:
    """A model of any architecture and its tokenizer, as the harness drives them.

    Raises:
        UserError: if there is no such model or tokenizer, the tokenizer has ids that the model has not, or no chat
            template where one is needed, or the device is not there.
    """
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"`device` is {device!r}, which cannot be used here: {str(error).splitlines()[0]}") from None
    model = load_causal_lm(folder)
    tokenizer = load_tokenizer(folder) if Path(folder).exists() else _tokenizer_of(folder)
    entries, highest = model.get_input_embeddings().num_embeddings, max(tokenizer.get_vocab().values())
    if highest >= entries:
        raise UserError(
            f"the tokenizer in {folder} does not fit the model: its ids go up to {highest:,}, and the model has "
            f"{entries:,} embeddings"
        )
    if chat and not tokenizer.chat_template:
        raise UserError(f"the tokenizer in {folder} has no chat template, which this suite asks its questions in")
    return _harness_model(model.to(place).eval(), tokenizer, tokens_per_batch, context_length)


def _harness_model(model: Any, tokenizer: Any, tokens_per_batch: int | None, context_length: int | None) -> Any:
    """The one place that says which of the harness's model classes computes."""
    return HarnessModel(model, tokenizer, max_length=context_length, tokens_per_batch=tokens_per_batch)


def _tokenizer_of(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"the tokenizer of {name} cannot be opened: {str(error).strip().splitlines()[0]}") from error


def load_tasks(tasks: Sequence[SuiteTask], local: dict[str, LocalTask], num_fewshot: int) -> dict[str, Any]:
    """The harness's task (or group of tasks) for each of ours, with its rows, by name.

    Raises:
        UserError: if the rows cannot be had or do not fit the task, or there are too few to draw examples from.
    """
    loaded: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="small-doge-") as folder:
        if local:
            write_tasks(list(local.values()), folder)
            manager = TaskManager(include_path=folder, include_defaults=False)
        else:  # only the folders in question: the harness has thousands of files
            paths: list[str | Path] = sorted({(harness_folder() / task.source).parent for task in tasks})
            manager = TaskManager(include_path=paths, include_defaults=False)
        for task in tasks:
            try:
                loaded[task.name] = manager.load([task.name])
            except Exception as error:  # datasets, jinja2 and the task's own functions each raise theirs
                where = f"the rows in {_folder(local[task.name])}" if local else "its rows on the Hub"
                hint = "" if local else "; --data_dir reads local files"
                raise UserError(f"task {task.name} cannot use {where}: {_first_line(error)}{hint}") from error
    for task in tasks:
        for name, one in loaded[task.name]["tasks"].items():
            # Where questions and examples share a split, the harness draws one example more and drops the question.
            shots = 0 if one.get_config("num_fewshot") == 0 else num_fewshot
            shared = one.fewshot_cfg.split == one.config.test_split and one.fewshot_cfg.sampler == "default"
            has = len(one.sampler.df) if shots else 0
            if shots and has < shots + shared:
                raise UserError(
                    f"task {name} has {has} rows to draw {shots} examples from, expected at least {shots + shared}; "
                    "--num_fewshot asks for fewer examples"
                )
    return loaded


def _folder(local: LocalTask) -> Path:
    return next(iter(next(iter(local.parts.values())).values()))[0].parent


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class RememberingModel(LM):
    """A harness model whose every answer goes to a file at once, and is taken from there the next time.

    The harness has such a cache (``use_cache``), in SQLite with a commit for each answer, which on a GPU takes longer
    than the answers. This one appends lines; the last may be cut short, and is then computed again. It also counts the
    requests, for the time left, and the prompts that are longer than the model can read.
    """

    def __init__(self, model: Any, path: Path, progress: Callable[[int, int], None] | None = None) -> None:
        super().__init__()
        self.model, self.progress = model, progress
        self.requests = self.truncated = 0
        self._answers = dict(_read_lines(path))
        self._path = path
        self._file: IO[str] | None = None
        self._done = self._total = 0
        model.set_cache_hook(self)  # the harness's models hand each answer to it as it comes

    def add_partial(self, attr: str, request: Any, answer: Any) -> None:
        """Called by the model for each answer: keep it."""
        self._done += 1
        self._keep(hash_args(attr, request), answer)
        if self.progress is not None:
            self.progress(self._done, self._total)

    def _keep(self, key: str, answer: Any) -> None:
        if key not in self._answers:
            self._answers[key] = answer
            if self._file is None:
                self._file = _append_to(self._path)
            self._file.write(json.dumps([key, answer]) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file of answers."""
        if self._file is not None:
            self._file.close()

    def _answer(self, attr: str, requests: list[Any]) -> list[Any]:
        self.requests += len(requests)
        self.truncated += _count_truncated(self.model, attr, requests)
        keys = [hash_args(attr, request.args) for request in requests]
        missing = [request for key, request in zip(keys, requests, strict=True) if key not in self._answers]
        self._done, self._total = len(requests) - len(missing), len(requests)
        if missing:
            found = getattr(self.model, attr)(missing, disable_tqdm=True)
            for request, answer in zip(missing, found, strict=True):
                self._keep(hash_args(attr, request.args), answer)
        answers = [self._answers[key] for key in keys]
        return [tuple(answer) for answer in answers] if attr == "loglikelihood" else answers

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Of each (context, continuation): the log-likelihood, and whether greedy decoding would give it."""
        return self._answer("loglikelihood", requests)

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Of each (context, settings): the text that greedy decoding goes on with."""
        return self._answer("generate_until", requests)

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Of each text: its log-likelihood."""
        return self._answer("loglikelihood_rolling", requests)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the prompt that the model was trained on."""
        return self.model.apply_chat_template(chat_history, add_generation_prompt=add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The model's chat template."""
        return self.model.chat_template(chat_template)

    @property
    def tokenizer_name(self) -> str:
        """Name of the model's tokenizer."""
        return self.model.tokenizer_name


def _append_to(path: Path) -> IO[str]:
    """The file of answers, open for appending, after the last whole line: half a line is no answer."""
    if path.exists():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with open(path, "r+b") as file:
                file.truncate(whole)
    return open(path, "a", encoding="utf-8", newline="\n")


def _read_lines(path: Path) -> list[tuple[str, Any]]:
    """Keys and answers in a file of answers; none if it is not there."""
    found = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").split("\n"):
            try:
                key, answer = json.loads(line)
            except ValueError:
                continue  # a process that was killed may leave half a line
            found.append((key, answer))
    return found


def _count_truncated(model: Any, attr: str, requests: list[Any]) -> int:
    """How many requests lose the beginning of their prompt because the model cannot read it all.

    Counted from the requests and not while the model runs, so that an interrupted run counts what it did before too.
    """
    limit, cut = model.max_length, 0
    lengths: dict[str, int] = {}
    for request in requests:
        context: str = request.args[0]
        rest: Any = request.args[1] if len(request.args) > 1 else ""
        if attr == "generate_until":
            new = rest.get("max_gen_toks", MAX_GEN_TOKS)
            if new >= limit:
                raise UserError(
                    f"task {request.task_name} lets the model write {new} tokens, and the model reads {limit:,} in all"
                )
            room, rest = limit - new, ""
        else:
            room = limit + 1  # the last token is predicted and not read
        # A token is at least a byte of text, the begin token aside, so a short request needs no tokenizer.
        if len((context + rest).encode()) < room:
            continue
        if context not in lengths:
            lengths[context] = len(model.tok_encode(context)) if context else 1
        if lengths[context] + len(rest.encode()) > room:
            cut += (len(model.tok_encode(context + rest)) if context else lengths[context]) > room
    return cut


def score_task(
    task: SuiteTask,
    loaded: dict[str, Any],
    model: RememberingModel,
    num_fewshot: int,
    limit: int | None,
    chat: bool,
) -> dict[str, Any]:
    """Run one task and return what is known of its score, as plain values.

    ``metrics`` and ``subtasks`` hold the harness's own numbers (0 to 1), ``chance`` what guessing gives on these rows.
    """
    started = time.perf_counter()
    found = simple_evaluate(
        model=model,
        tasks=[(loaded["groups"] or loaded["tasks"])[task.name]],
        num_fewshot=num_fewshot,
        limit=limit,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        log_samples=False,
        task_manager=TaskManager(include_defaults=False),  # the tasks are loaded; this spares an index of all others
    )
    counts = found["n-samples"].values()
    whole = found["results"][task.name]
    return {
        "metric": task.metric,
        "metrics": _metrics(whole),
        "subtasks": {name: _metrics(values) for name, values in found["results"].items() if name != task.name},
        "chance": _chance(loaded["tasks"].values()),
        "documents": sum(count["effective"] for count in counts),
        "documents_in_all": sum(count["original"] for count in counts),
        "num_fewshot": max(found["n-shot"][name] for name in loaded["tasks"]),
        "requests": model.requests,
        "truncated": model.truncated,
        "version": found["versions"][task.name],
        "seconds": round(time.perf_counter() - started, 3),
    }


def _metrics(values: dict[str, Any]) -> dict[str, float | None]:
    """``{"acc,none": …}`` with the filter's name left out; what the harness calls N/A is None."""
    return {
        key.split(",")[0]: float(value) if isinstance(value, (int, float)) else None
        for key, value in values.items()
        if "," in key
    }


def _chance(tasks: Any) -> float | None:
    """What guessing scores: over the documents, the mean of one in so many answers; 0 for answers in free words."""
    shares = []
    for task in tasks:
        if task.OUTPUT_TYPE != "multiple_choice":
            return 0.0 if task.config.process_results is None else None
        answers: dict[int, int] = {}
        for request in task.instances:
            answers[request.doc_id] = answers.get(request.doc_id, 0) + 1
        shares += [1 / count for count in answers.values()]
    return sum(shares) / len(shares)
