"""The commands of README.md, of the training guide and of the how-to pages, run as they are written in a clean folder.

``pytest -m slow -s tests/test_readme_runs.py`` takes more than an hour on two cores: it makes the demo, trains on text
of one's own and plays with rewards. ``DOGE_README_RUNS=FOLDER`` names finished runs, such as the ``runs`` of an earlier
time: they are put in the folder's ``runs`` first, and a command that finds its own there says so and is done.
"""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import site
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
import venv
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from test_docs import commands

ROOT = Path(__file__).parents[1]
GUIDE = ("recipes/README.md",)
# In the order of the site: a page may use what one before it made.
README_AND_HOWTO = ("README.md", *(f"docs/howto/{name}.md" for name in (
    "own_data", "continue", "evaluate", "chat_and_serve", "quantise", "grow_experts"
)))  # fmt: skip
# What cannot be run here, and why. Its `doge` commands are held against the parser, like all others.
NOT_HERE = {
    r"^docker ": "needs Docker",
    r"^\.venv\\Scripts": "is for Windows",
    r"^make test\b": "is what is running",
    r"recipes/doge-\d": "a published size: text from the Hub, or hours on a GPU",
    r"(?<!recipes/)runs/doge-\d": "needs a model or a tokenizer of a published size",
    r"^doge evaluate MODEL --suite doge-base *(#|$)": "asks the Hub for rows",
}
ADDRESS = "http://127.0.0.1:8000"
KEY = "a key"
SECONDS = 3600  # more than any one of them takes


@dataclass(frozen=True)
class Code:
    """A command, or a block of Python, of a page."""

    page: str
    text: str
    language: str = "sh"

    @property
    def reason(self) -> str | None:
        """Why it cannot be run here, or None if it can."""
        return next((why for pattern, why in NOT_HERE.items() if re.search(pattern, self.text)), None)


def code_of(page: str) -> list[Code]:
    """What a page has a reader run, in its order: lines of shell, and blocks of Python as one."""
    found, language, block = [], None, []
    for line in (ROOT / page).read_text("utf-8").splitlines():
        words = line.strip()
        if words.startswith("```"):
            if language == "python":
                found.append(Code(page, "\n".join(block), language))
            language, block = (words[3:], []) if language is None else (None, [])
        elif language == "python":
            block.append(line)
        elif words and (language in ("sh", "bash") or (language is None and is_command(line))):
            found.append(Code(page, words))
    return found


def is_command(line: str) -> bool:
    """Whether an indented line is one: the others are lists of places, which begin with a path."""
    return line.startswith("    ") and "/" not in line.split()[0]


PAGES = (*README_AND_HOWTO, *GUIDE)
ALL = [code for page in PAGES for code in code_of(page)]


def test_every_page_is_read():
    assert {f"docs/howto/{path.name}" for path in (ROOT / "docs" / "howto").glob("*.md")} < set(README_AND_HOWTO)
    assert sum(code.reason is None for code in ALL) > 60
    for page in PAGES:
        lines = [line.strip() for line in (ROOT / page).read_text("utf-8").splitlines()]
        written = [line for line in lines if line.startswith(("doge ", "accelerate launch "))]
        assert written == [code.text for code in code_of(page) if code.text in written]


@pytest.mark.parametrize("pattern", NOT_HERE)
def test_every_exception_is_of_some_command(pattern):
    assert [code for code in ALL if re.search(pattern, code.text)]


def test_what_cannot_run_here_is_held_against_the_parser():
    """By test_readme_commands, test_docs and test_readme_zh, which take a page's commands from the same lines."""
    for page in PAGES:
        parsed = list(commands((ROOT / page).read_text("utf-8")))
        left_out = [code for code in code_of(page) if code.reason and code.text.startswith(("doge", "accelerate"))]
        assert all(next(commands(code.text)) in parsed for code in left_out)


def prepare(folder: Path) -> None:
    """The checkout as it is, an environment that has this one's packages, and what the pages say that a reader has."""
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],  # noqa: S607
        cwd=ROOT, capture_output=True, check=True,
    ).stdout.decode()  # fmt: skip
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():  # else it is deleted, and not yet in a commit
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / "runs").mkdir()
    if runs := os.environ.get("DOGE_README_RUNS"):
        shutil.copytree(runs, folder / "runs", dirs_exist_ok=True, symlinks=True)

    # pip finds every package there already, and installs nothing but the checkout: into the new environment.
    venv.create(folder / ".venv", with_pip=True, symlinks=True)
    inside = sysconfig.get_path("purelib", vars={"base": str(folder / ".venv")})
    Path(inside, "packages_of_the_tests.pth").write_text("\n".join(site.getsitepackages()) + "\n")

    texts = folder / "my_texts"
    texts.mkdir()
    stdlib = Path(sysconfig.get_path("stdlib"))
    for path in (*stdlib.glob("*.py"), *stdlib.glob("*/*.py")):  # enough for the guide's vocabulary of 32,768
        if path.parent.name not in ("test", "site-packages"):
            shutil.copyfile(path, texts / f"{path.parent.name}-{path.stem}.txt")
    (folder / "held_out.txt").write_text((ROOT / "README.md").read_text("utf-8"), "utf-8")
    sums = [(a, b) for a in range(2, 40) for b in range(3, 19)]
    asked = [(f"What is {a} + {b}?", f"{a} + {b} = {a + b}.") for a, b in sums]
    chats = [
        {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": say}]} for ask, say in asked
    ]
    pairs = [{"prompt": ask, "chosen": say, "rejected": "I do not know."} for ask, say in asked]
    checked = [{"prompt": ask, "answer": a + b} for (ask, _), (a, b) in zip(asked, sums, strict=True)]
    for name, rows in {"chats": chats, "my_chats": chats, "pairs": pairs, "my_pairs": pairs, "sums": checked}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    # README's capitals: a model that reads more than the demo's 256 tokens, and rows of all tasks.
    spec = importlib.util.spec_from_file_location("suite_rows", ROOT / "tests" / "evaluation" / "suite_rows.py")
    suite_rows = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(suite_rows)
    (folder / "models").mkdir()
    suite_rows.write_models(folder / "models")
    (folder / "MODEL").symlink_to(Path("models", "doge"))
    suite_rows.write_suite(folder / "ROWS")


@dataclass
class Reader:
    """One who types what the pages say, in a folder, and notes what went wrong."""

    folder: Path
    home: Path
    wrong: list[str] = field(default_factory=list)
    server: subprocess.Popen | None = None

    def __post_init__(self) -> None:
        self.environment = os.environ | {
            "PATH": f"{self.folder / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(self.home),
            "DOGE_API_KEY": KEY,
        }
        self.environment.pop("VIRTUAL_ENV", None)

    def type(self, code: Code) -> None:
        """Run it, and note it if it fails."""
        began = time.perf_counter()
        if code.text.startswith("doge serve "):
            wrong = self.serve(code)
        else:
            shell = ["python", "-"] if code.language == "python" else ["bash", "-c", code.text]
            typed = {"python": code.text}.get(code.language, "Hello\n/exit\n" if "doge chat " in code.text else "")
            done = subprocess.run(
                shell, cwd=self.folder, env=self.environment, input=typed, capture_output=True, text=True,
                timeout=SECONDS, check=False,
            )  # fmt: skip
            wrong = self.judge(code, done.returncode, done.stdout, done.stderr)
        print(f"{time.perf_counter() - began:7.1f} s  {code.page}: {code.text.splitlines()[0]}", flush=True)
        if wrong:
            print(wrong, flush=True)
            self.wrong.append(wrong)

    def judge(self, code: Code, status: int, output: str, errors: str) -> str | None:
        bars = len(re.findall(r"\d+%\|", errors)) > 2  # of the one that cannot be turned off, DPO's, both ends are left
        if "Traceback" not in errors and not bars and (status == 0 or self.is_foretold(code, errors)):
            return None
        last = "\n".join((output + errors).splitlines()[-15:])
        found = "a progress bar in what is no terminal" if bars else f"exit status {status}"
        return f"{code.page}: `{code.text}`: {found}\n{last}"

    def is_foretold(self, code: Code, errors: str) -> bool:
        """README: where the demo had time for fewer steps than the recipe says, `sft` and `dpo` refuse its folder."""
        stage = re.fullmatch(r"doge (sft|dpo) +--config recipes/doge-tiny/\1\.yaml", code.text)
        if not stage or "holds a different run" not in errors:
            return False
        demo = json.loads((self.folder / "runs" / "demo" / stage[1] / "stage.json").read_text("utf-8"))
        recipe = yaml.safe_load((self.folder / "recipes" / "doge-tiny" / f"{stage[1]}.yaml").read_text("utf-8"))
        return demo["steps"] < recipe["max_steps"]

    def serve(self, code: Code) -> str | None:
        """Start a server and ask it, by its page and as any OpenAI client does; it stays until :meth:`stop`."""
        from openai import OpenAI

        self.stop()
        with socket.socket() as port:
            assert port.connect_ex(("127.0.0.1", 8000)), "port 8000 is taken: end what listens there"
        self.log = open(self.home / "serve.log", "w+", encoding="utf-8")  # noqa: SIM115
        self.server = subprocess.Popen(
            ["bash", "-c", f"exec {code.text}"], cwd=self.folder, env=self.environment,  # noqa: S607
            stdout=self.log, stderr=self.log,
        )  # fmt: skip
        client = OpenAI(base_url=f"{ADDRESS}/v1", api_key=KEY, timeout=60, max_retries=0)
        error: Exception | None = None
        for _ in range(240):
            try:
                with urllib.request.urlopen(ADDRESS, timeout=5) as page:
                    assert "<html" in page.read().decode().lower()
                (model,) = client.models.list()
                messages = [{"role": "user", "content": "What does os.path.join do?"}]
                reply = client.chat.completions.create(model=model.id, messages=messages, max_tokens=8)
                return None if reply.choices[0].message.content else f"{code.text}: an empty reply"
            except Exception as found:
                error = found
                if self.server.poll() is not None:
                    break
                time.sleep(0.5)
        self.log.seek(0)
        return self.judge(code, self.server.poll() or 1, self.log.read(), f"no answer: {error}")

    def stop(self) -> None:
        """End the server as Ctrl-C does."""
        if self.server is None:
            return
        self.server.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.server.wait(30)
        ended = self.server.poll()
        self.server.kill()
        self.log.seek(0)
        said = self.log.read()
        self.log.close()
        if ended not in (0, 130) or "Traceback" in said:
            self.wrong.append(f"doge serve, after Ctrl-C: exit status {ended}\n" + "\n".join(said.splitlines()[-15:]))
        self.server = None


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="the commands are of a POSIX shell")
@pytest.mark.parametrize("pages", [README_AND_HOWTO, GUIDE], ids=["readme_and_howto", "guide"])
def test_every_command_does_what_the_page_says(pages, tmp_path):
    pytest.importorskip("trl")
    folder, home = tmp_path / "small-doge", tmp_path / "home"
    folder.mkdir()
    home.mkdir()
    prepare(folder)
    reader = Reader(folder, home)
    try:
        for page in pages:
            for code in code_of(page):
                if code.reason is None:
                    reader.type(code)
            reader.stop()
    finally:
        if reader.server is not None:
            reader.server.kill()
    assert not reader.wrong, "\n\n".join(reader.wrong)
