"""`doge evaluate --suite`: the harness's own numbers, resumed as if never interrupted, mistakes in one sentence."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

import suite_rows

from small_doge import cli
from small_doge.errors import UserError
from small_doge.evaluation import harness, suite_run
from small_doge.evaluation.evaluate import EvaluateRecipe, evaluate
from small_doge.evaluation.local_tasks import find_local, write_tasks
from small_doge.evaluation.suites import SUITES, TASKS

BASE = SUITES["doge-base"].tasks
# The harness's command line, for each model and number of examples in one process; the tasks are those of
# --include_path, which in the first run lie over all of the harness's own, as for a user, and alone in the others,
# which saves reading thousands of files.
HARNESS = """
import functools, json, sys
import small_doge, lm_eval.evaluator, lm_eval.tasks
from lm_eval.__main__ import cli_evaluate
lm_eval.evaluator.add_env_info = lambda results: None  # asks pip for every package, a second a time
tasks, include, device, runs = sys.argv[1:5]
whole = lm_eval.tasks.TaskManager
for number, (model, shots, output) in enumerate(json.loads(runs)):
    lm_eval.tasks.TaskManager = functools.partial(whole, include_defaults=number == 0)
    sys.argv = ["lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={model}", "--tasks", tasks]
    sys.argv += ["--include_path", include, "--num_fewshot", str(shots), "--batch_size", "4", "--device", device]
    sys.argv += ["--output_path", output]
    cli_evaluate()
"""


@pytest.fixture(scope="module", autouse=True)
def no_list_of_packages():
    """The harness asks pip for every package after each task, most of a second here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
        yield


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with the rows of all tasks in ``rows``, and the models ``doge`` and ``llama``."""
    folder = tmp_path_factory.mktemp("suite")
    suite_rows.write_suite(folder / "rows")
    suite_rows.write_models(folder)
    return folder


def run(desk, output, model="doge", **fields):
    recipe = {"suite": "doge-base", "data_dir": str(desk / "rows"), "device": "cpu"} | fields
    path = evaluate(EvaluateRecipe(str(desk / model), output_dir=str(output), **recipe))
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def ours(desk):
    """What `doge evaluate` says of the Doge, five-shot, and the folder it is in."""
    return run(desk, desk / "ours"), desk / "ours"


def test_the_numbers_are_those_of_the_harness_command(desk, ours, tmp_path):
    """Our Doge five-shot and a Llama zero-shot; one test, because the harness takes long to start."""
    write_tasks([find_local(desk / "rows", TASKS[name]) for name in BASE], tmp_path / "include")
    runs = [("doge", 5), ("llama", 0)]
    outputs = [(str(desk / model), shots, str(tmp_path / f"{model}-{shots}.json")) for model, shots in runs]
    words = [sys.executable, "-c", HARNESS, ",".join(BASE), str(tmp_path / "include"), "cpu", json.dumps(outputs)]
    with open(tmp_path / "said.txt", "w") as said:
        theirs = subprocess.Popen(words, stdout=said, stderr=said)
    try:
        mine = {("llama", 0): run(desk, tmp_path / "llama", "llama", num_fewshot=0), ("doge", 5): ours[0]}
        assert theirs.wait() == 0, (tmp_path / "said.txt").read_text()[-3000:]
    finally:
        theirs.kill()
    for (model, shots), results in mine.items():
        (path,) = tmp_path.glob(f"{model}-{shots}_*.json")
        expected = json.loads(path.read_text(encoding="utf-8"))["results"]
        assert tuple(results["scores"]) == BASE
        assert len(results["scores"]["mmlu"]["subtasks"]) == 57 + 4
        for name, score in results["scores"].items():
            for part, metrics in {name: score["metrics"], **score["subtasks"]}.items():
                said = {key.split(",")[0]: value for key, value in expected[part].items() if "," in key}
                said = {key: None if value == "N/A" else value for key, value in said.items()}
                assert metrics == pytest.approx(said, abs=1e-12), (model, shots, part)
        shown = [score["score"] for score in results["scores"].values()]
        assert len(set(shown)) > 3  # a model that always gave the first answer would prove little


def test_what_is_written(desk, ours, capsys):
    results, folder = ours
    mmlu, arc, trivia = (results["scores"][name] for name in ("mmlu", "arc_easy", "triviaqa"))
    assert (mmlu["chance"], trivia["chance"]) == (25, 0)
    rows = [json.loads(line) for line in (desk / "rows/arc_easy/test.jsonl").read_text().splitlines()]
    assert arc["chance"] == pytest.approx(100 * sum(1 / len(r["choices"]["text"]) for r in rows) / len(rows))
    assert (arc["documents"], arc["documents_in_all"]) == (6, 6)
    assert results["parameters"] > 10_000
    table = (folder / "table.md").read_text(encoding="utf-8")
    lines = table.splitlines()
    assert lines[0].split(" | ")[1:4] == ["MMLU", "TriviaQA", "ARC-E"]
    assert [line.split(" | ")[0] for line in lines[3:6]] == [
        "| random guess",
        "| Doge-20M, published",
        "| Doge-60M, published",
    ]
    assert "25.43 | 0.03 | 36.83 | 22.78 | 58.38 | 27.25 | 25.60 | 50.20" in lines[4]
    assert "not measured here" in table
    assert "PIQA: few-shot examples are other rows of its validation split" in table
    assert "ARC-E: few-shot" not in table
    assert (folder / "scores.png").read_bytes().startswith(b"\x89PNG")

    from huggingface_hub import ModelCard

    card = ModelCard.load(folder / "README.md")
    by_name = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert by_name["ARC-E", "acc_norm"] == round(arc["score"], 2)
    assert len(by_name) == 8
    assert table in card.text

    # Once more: nothing is computed, and a folder evaluated before stands beside it.
    again = run(desk, folder, compare=str(folder), tasks="piqa")
    assert again == results
    assert (folder / "table.md").read_text(encoding="utf-8").count("/doge |") == 2


def test_an_interrupted_run_goes_on_and_ends_in_the_same_table(desk, tmp_path, monkeypatch):
    fields = {"tasks": "arc_easy,hellaswag,triviaqa", "num_fewshot": 2}
    run(desk, tmp_path / "whole", **fields)
    asked = []
    original = suite_run._Progress.__call__

    def stop(self, done, total):
        original(self, done, total)
        asked.append(self.label)
        if self.label.startswith("3/3") and done == 11:
            raise KeyboardInterrupt

    monkeypatch.setattr(suite_run._Progress, "__call__", stop)
    with pytest.raises(KeyboardInterrupt):
        run(desk, tmp_path / "parts", **fields)
    assert not (tmp_path / "parts" / "results.json").exists()
    monkeypatch.setattr(suite_run._Progress, "__call__", lambda self, done, total: asked.append(self.label))
    with open(tmp_path / "parts/tasks/hellaswag/answers.jsonl", "a") as file:
        file.write('["half a li')  # what a killed process may leave
    asked.clear()
    run(desk, tmp_path / "parts", **fields)
    assert set(asked) == {"1/1 HellaSwag"}
    assert len(asked) == 4 * suite_rows.EVALUATED - 11
    for name in ("table.md", "results.json"):
        whole, parts = (json_or_text(tmp_path / folder / name) for folder in ("whole", "parts"))
        assert whole == parts
    lines = (tmp_path / "parts/tasks/hellaswag/answers.jsonl").read_text().splitlines()
    assert len([json.loads(line) for line in lines]) == 4 * suite_rows.EVALUATED


def json_or_text(path):
    """A file's content, less what differs between any two runs: the seconds."""
    content = path.read_text(encoding="utf-8")
    if path.suffix != ".json":
        return content
    results = json.loads(content)
    for score in results["scores"].values():
        del score["seconds"]
    return results


@pytest.mark.parametrize("name", ["piqa", "hellaswag", "arc_easy"])
def test_no_question_is_among_its_own_examples(desk, tmp_path, name):
    data = desk / "rows"
    if name == "arc_easy":  # a task whose questions the harness calls test, and whose train rows are not there
        data = tmp_path
        suite_rows.write_rows(data / "arc_easy/test.jsonl", suite_rows.arc, 7, 0)
    local = find_local(data, TASKS[name])
    assert local.same_split
    task = harness.load_tasks([TASKS[name]], {name: local}, 5)[name]["tasks"][name]
    task.set_config("num_fewshot", 5)
    task.set_fewshot_seed(1234)
    task.build_all_requests()
    questions = [task.doc_to_text(doc) for doc in task.eval_docs]
    assert len(task.instances) >= 2 * len(questions)
    for request in task.instances:
        own = task.doc_to_text(request.doc)
        assert request.args[0].count(own) == 1
        assert sum(question in request.args[0] for question in questions) == 6


def test_a_prompt_longer_than_the_context_is_counted_and_shown(desk, tmp_path):
    results = run(desk, tmp_path / "out", tasks="arc_easy,triviaqa", context_length=300, num_fewshot=4)
    arc, trivia = results["scores"]["arc_easy"], results["scores"]["triviaqa"]
    assert (
        trivia["truncated"] == trivia["requests"] == suite_rows.QUESTIONS["triviaqa"]
    )  # 256 of 300 tokens are for the answer
    table = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert f"lost their start: TriviaQA {trivia['truncated']} of {trivia['requests']}" in table
    # The count is that of the model that cuts them.
    model = harness.open_model(str(desk / "doge"), "cpu", None, 60, False)
    tasks = harness.load_tasks([TASKS["arc_easy"]], {"arc_easy": find_local(desk / "rows", TASKS["arc_easy"])}, 1)
    remembering = harness.RememberingModel(model, tmp_path / "answers.jsonl")
    score = harness.score_task(TASKS["arc_easy"], tasks["arc_easy"], remembering, 1, None, False)
    remembering.close()
    assert 0 < score["truncated"] == model.truncated < score["requests"]
    assert arc["requests"] == score["requests"]


def test_a_chat_suite_asks_in_the_chat_template(desk, tmp_path):
    fields = {"suite": "doge-instruct", "tasks": "piqa", "num_fewshot": 1}
    asked = []
    original = harness.HarnessModel.loglikelihood

    def listen(self, requests, **options):
        asked.extend(request.args[0] for request in requests)
        return original(self, requests, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness.HarnessModel, "loglikelihood", listen)
        results = run(desk, tmp_path / "out", **fields)
    assert asked[0].count("<|start_header_id|>user<|end_header_id|>") == 2
    assert asked[0].endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")
    assert "published" not in (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert results["scores"]["piqa"]["documents"] == suite_rows.EVALUATED


def broken(desk, tmp_path, name, edit):
    """The rows of one task again, changed by ``edit(folder)``."""
    for path in (desk / "rows" / name).rglob("*.jsonl"):
        copy = tmp_path / "rows" / path.relative_to(desk / "rows")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    edit(tmp_path / "rows" / name)
    return tmp_path / "rows"


def rename(path, old, new):
    path.write_text(path.read_text().replace(f'"{old}"', f'"{new}"'))


def keep(path, count):
    path.write_text("\n".join(path.read_text().splitlines()[:count]) + "\n")


def change(path, **columns):
    rows = [json.loads(line) | columns for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


MISTAKES = {
    "no file": ("winogrande", lambda f: (f / "validation.jsonl").unlink(), ["winogrande", "validation.jsonl"]),
    "no file of a subject": ("mmlu", lambda f: (f / "anatomy/dev.jsonl").unlink(), ["anatomy", "dev.jsonl"]),
    "no column": ("arc_easy", lambda f: rename(f / "test.jsonl", "answerKey", "key"), ["test.jsonl", "`answerKey`"]),
    "no inner column": ("openbookqa", lambda f: rename(f / "train.jsonl", "text", "t"), ["`choices.text`", "line 1"]),
    "not JSON": ("piqa", lambda f: (f / "validation.jsonl").write_text("{"), ["validation.jsonl", "JSON Lines"]),
    "no rows": ("piqa", lambda f: (f / "validation.jsonl").write_text("\n"), ["holds no rows"]),
    "four examples": ("arc_easy", lambda f: keep(f / "train.jsonl", 4), ["arc_easy has 4 rows", "at least 5"]),
    "only itself left": ("hellaswag", lambda f: keep(f / "validation.jsonl", 5), ["has 5 rows", "at least 6"]),
    "four of a subject": ("mmlu", lambda f: keep(f / "virology/dev.jsonl", 4), ["mmlu_virology has 4 rows"]),
    "label of another kind": (
        "arc_easy",
        lambda f: change(f / "test.jsonl", answerKey="Z"),
        ["task arc_easy cannot use the rows in"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_rows_that_do_not_fit_are_one_sentence_and_leave_nothing(desk, tmp_path, mistake, capsys):
    name, edit, expected = MISTAKES[mistake]
    data = broken(desk, tmp_path, name, edit)
    words = ["evaluate", str(desk / "doge"), "--suite", "doge-base", "--tasks", name]
    assert cli.main([*words, "--data_dir", str(data), "--output_dir", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert all(part in said[-1] for part in expected), said
    assert "Traceback" not in "".join(said)
    assert not (tmp_path / "out").exists()


def test_other_mistakes(desk, ours, tmp_path):
    out = {"output_dir": str(tmp_path / "out"), "data_dir": str(desk / "rows")}
    model = str(desk / "doge")
    for arguments, said in (
        ({"model": model, "suite": "doge-bas"}, r"no suite 'doge-bas' \(did you mean `doge-base`\?\)"),
        ({"model": model, "suite": "doge-base", "tasks": ["mmul"]}, r"no task 'mmul' \(did you mean `mmlu`\?\)"),
        ({"model": str(desk), "suite": "doge-base", "tasks": "piqa"}, "holds no model: config.json"),
        ({"model": str(desk / "nowhere"), "suite": "doge-base", "tasks": "piqa"}, "nowhere does not exist"),
        ({"model": model, "suite": "doge-base", "compare": str(desk / "rows")}, "no results to compare with"),
        ({"model": model, "suite": "doge-base", "tasks": "piqa", "device": "gpu"}, "`device` is 'gpu'"),
        ({"model": model, "suite": "doge-base", "tasks": "piqa", "data_dir": str(desk)}, "has no piqa"),
        ({"model": model, "suite": "doge-base", "tasks": "triviaqa", "context_length": 256}, "write 256 tokens"),
    ):
        with pytest.raises(UserError, match=said):
            evaluate(EvaluateRecipe(**(out | arguments)))
        if "context_length" not in arguments:
            assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="`num_fewshot` is 5 there and 1 here"):
        run(desk, ours[1], num_fewshot=1, tasks="piqa")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file.txt").write_text("mine")
    with pytest.raises(UserError, match="holds files that are not of this run"):
        run(desk, tmp_path / "mine", tasks="piqa")
    for fields in ({}, {"suite": "doge-base", "data": "d"}, {"suite": "doge-base", "limit": 0}, {"data": "d"}):
        with pytest.raises(ValueError, match=r"expected one|at least 1|output_dir"):
            EvaluateRecipe(model, **fields)


def test_a_tokenizer_that_does_not_fit_the_model(desk, tmp_path):
    from small_doge import DogeConfig, DogeForCausalLM

    config = DogeConfig(vocab_size=200, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    DogeForCausalLM(config).save_pretrained(tmp_path / "small")
    with pytest.raises(UserError, match=r"holds no tokenizer\.json"):
        harness.open_model(str(tmp_path / "small"), "cpu", None, None, False)
    for file in (desk / "doge").glob("tokenizer*"):
        (tmp_path / "small" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="ids go up to 319, and the model has 200 embeddings"):
        harness.open_model(str(tmp_path / "small"), "cpu", None, None, False)


def test_parquet_files_are_read_too(desk, tmp_path):
    import pyarrow.json
    import pyarrow.parquet

    for split in ("train", "test"):
        table = pyarrow.json.read_json(desk / "rows" / "openbookqa" / f"{split}.jsonl")
        (tmp_path / "openbookqa").mkdir(exist_ok=True)
        pyarrow.parquet.write_table(table, tmp_path / "openbookqa" / f"{split}-00000-of-00001.parquet")
    fields = {"tasks": "openbookqa", "num_fewshot": 1}
    mine = run(desk, tmp_path / "out", data_dir=str(tmp_path), **fields)
    assert mine["scores"]["openbookqa"]["metrics"] == pytest.approx(
        run(desk, tmp_path / "json", **fields)["scores"]["openbookqa"]["metrics"]
    )
    narrow = pyarrow.parquet.read_table(tmp_path / "openbookqa" / "test-00000-of-00001.parquet").drop(["answerKey"])
    pyarrow.parquet.write_table(narrow, tmp_path / "openbookqa" / "test-00000-of-00001.parquet")
    with pytest.raises(UserError, match="lacks the column `answerKey`"):
        find_local(tmp_path, TASKS["openbookqa"])


def test_the_output_folder_by_default_is_beside_the_weights(desk):
    recipe = EvaluateRecipe(str(desk / "doge"), suite="doge-base", limit=5, num_fewshot=0)
    where = suite_run._output_dir(recipe, SUITES["doge-base"])
    assert where == Path(desk / "doge" / "evaluation" / "doge-base-0shot-limit5")
    with pytest.raises(UserError, match="say where results go"):
        suite_run._output_dir(EvaluateRecipe("someone/model", suite="doge-base"), SUITES["doge-base"])
