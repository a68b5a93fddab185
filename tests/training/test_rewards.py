"""Rewards: what is paid, what is not although it looks like it, and every bound of the process that runs code."""

import os
import socket
import threading
import time
from pathlib import Path

import pytest

from small_doge.data.verifiable import integer_of
from small_doge.errors import UserError
from small_doge.training import bounded, rewards
from small_doge.training.bounded import Bounds, passes
from small_doge.training.rewards import REWARDS, code_block, rewards_of

posix = pytest.mark.skipif(os.name != "posix", reason="code rewards need POSIX")
RIGHT = "def double(x):\n    return 2 * x\n"
TESTS = "assert double(2) == 4\nassert double(-1) == -2"


@pytest.mark.parametrize(
    ("text", "integer"),
    [
        ("42", "42"),
        ("The answer is 42.", "42"),
        ("7 + 5 = 12, so 12!", "12"),
        ("1 2 3 4 5", "5"),  # saying every number pays for the last one only
        ("it is -7", "-7"),
        ("it is \u22127", "-7"),
        ("8-5", "5"),  # a difference, not minus five
        ("(8)-5", "5"),
        ("007", "7"),
        ("-0", "0"),
        ("+3", "3"),
        ("1,024", "1024"),
        ("1,02", None),
        ("4.5", None),  # its last digits are no number of their own
        ("12 4.5", None),
        ("1e5", None),
        ("x12", None),
        ("12th", None),
        ("\uff11\uff12", None),  # digits of other scripts
        ("**12**", "12"),
        ("_12_", "12"),
        ("12,", "12"),
        ("9" * 5000, "9" * 5000),  # more digits than int() reads
        ("none", None),
        ("", None),
    ],
)
def test_the_last_number_is_the_answer(text, integer):
    assert integer_of(text) == integer


def test_arithmetic_pays_for_the_answer_alone():
    said = ["12", "so 12.", "12 or 13", "13 or 12", "1.12", ""]
    assert REWARDS["arithmetic"](said, answer=["12"] * 6) == [1, 1, 0, 1, 0, 0]


def test_rows_without_a_column_are_not_judged():
    messages = [[{"role": "assistant", "content": "12"}]] * 2
    assert REWARDS["arithmetic"](messages, answer=["12", None]) == [1.0, None]
    assert REWARDS["code"](["x"], answer=["12"]) == [None]


def test_format_pays_for_an_integer_and_nothing_else():
    said = ["12", " -3.\n", "1,024", "It is 12", "12 12", "1,02", "."]
    assert REWARDS["format"](said) == [1, 1, 1, 0, 0, 0, 0]


def test_the_last_closed_block_is_the_code():
    assert code_block("a\n```python\nx = 1\n```\nb\n```\ny = 2\n```") == "y = 2\n"
    assert code_block("```python\nx = 1\n```\n```python\ny = 2") == "x = 1\n"
    assert code_block("x = 1") is None
    assert code_block("```sh\nls\n```") is None


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["arithmetics"], "did you mean `?arithmetic"),
        (["format"], "expected arithmetic or code"),
        (["arithmetic", "arithmetic"], "none twice"),
        ([], "expected arithmetic or code"),
    ],
)
def test_rewards_that_cannot_be_are_refused(names, match):
    with pytest.raises(UserError, match=match):
        rewards_of(names)


def test_without_posix_code_is_refused_and_arithmetic_works(monkeypatch):
    class Other:
        name = "nt"

    monkeypatch.setattr(bounded, "os", Other)
    with pytest.raises(UserError, match="Linux or macOS"):
        rewards_of(["code"])
    assert rewards_of(["arithmetic"])[0](["3"], answer=["3"]) == [1]


@posix
def test_code_is_paid_if_it_passes_its_tests():
    said = [f"```python\n{RIGHT}```", "```python\ndef double(x):\n    return 4\n```", RIGHT, "```python\ndef (\n```"]
    assert REWARDS["code"](said, tests=[TESTS] * 4) == [1, 0, 0, 0]


@posix
@pytest.mark.parametrize(
    "code",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise SystemExit(0)",
        "import os; os.write(1, b'a' * 32)",
        "print('a' * 32)",
        "quit()",
        "x = '\\ud800'",
        "assert __name__ == '__main__'",
    ],
)
def test_ending_early_or_talking_is_not_paid(code):
    assert not passes(code, TESTS)


@posix
def test_usual_imports_work_and_nothing_of_ours_is_there():
    usual = "import bisect, dataclasses, datetime, decimal, fractions, functools, heapq, statistics, typing, string"
    assert passes(usual, "assert statistics.mean([1, 3]) == 2")
    assert passes("import os", "assert not set(os.environ) - {'LC_CTYPE', '__CF_USER_TEXT_ENCODING'}")
    assert not passes("import small_doge", "pass")
    assert not passes("import numpy", "pass")


@posix
def test_an_endless_loop_is_ended():
    start = time.monotonic()
    assert not passes("while True:\n    pass", TESTS, Bounds(seconds=0.5))
    assert not passes(
        "import time\ntry:\n    time.sleep(60)\nexcept BaseException:\n    pass", TESTS, Bounds(seconds=0.5)
    )
    assert time.monotonic() - start < 3


@posix
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the limit of the address space is Linux's")
def test_memory_is_bounded():
    assert not passes("x = bytearray(300 << 20)", "pass", Bounds(memory=200 << 20))
    assert passes("x = bytearray(300 << 20)", "pass", Bounds(memory=600 << 20))
    assert not passes("x = []\nwhile True:\n    x.append('a' * 100000)", "pass", Bounds(memory=200 << 20))


@posix
@pytest.mark.parametrize(
    "start",
    [
        "os.fork()",
        "os.system('true')",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "os.execv('/bin/true', ['true'])",
        "subprocess.run(['true'])",
        "__import__('ctypes').CDLL(None).fork()",
        "__import__('_posixsubprocess').fork_exec(*[None] * 23)",
    ],
)
def test_no_process_is_started(tmp_path, start):
    """Not a bomb: if it were started, it is one process, and it ends."""
    refused = f"import os, subprocess\ntry:\n    {start}\nexcept (OSError, TypeError):\n    refused = True"
    assert passes(refused, "assert refused", Bounds(seconds=3))


@posix
def test_a_bounded_fork_bomb_leaves_nothing():
    code = (
        "import os\nfor _ in range(3):\n    try:\n        os.fork()\n    except OSError:\n        pass\nn = os.getpid()"
    )
    start = time.monotonic()
    assert passes(code, "assert n == os.getpid()")
    assert time.monotonic() - start < 3


@posix
def test_nothing_is_written_outside(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("whole")
    tmp_path.chmod(0o777)
    victim.chmod(0o666)
    for change in (
        f"open({str(victim)!r}, 'w').write('x')",
        f"os.open({str(victim)!r}, os.O_WRONLY | os.O_TRUNC)",
        f"os.remove({str(victim)!r})",
        f"os.rename({str(victim)!r}, 'mine')",
        f"os.symlink({str(tmp_path)!r}, 'link'); open('link/victim', 'w').write('x')",
        f"open({str(tmp_path / 'new')!r}, 'w')",
        "os.mkdir('../new-folder-of-a-test')",
        f"import sqlite3; sqlite3.connect({str(tmp_path / 'new')!r}).execute('create table t (x)')",
    ):
        assert not passes(f"import os\n{change}", "pass"), change
    assert victim.read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["victim"]
    assert passes("open('mine', 'w').write('x')", "assert open('mine').read() == 'x'")


@posix
def test_files_are_small_and_few():
    assert not passes("open('big', 'w').write('x' * 3_000_000)", "pass")
    assert not passes("files = [open('f', 'w') for _ in range(100)]", "pass")


@posix
def test_the_network_cannot_be_reached():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(1.0)
        reached = []

        def accept():
            try:
                server.accept()
                reached.append(True)
            except TimeoutError:
                pass

        thread = threading.Thread(target=accept)
        thread.start()
        address = server.getsockname()
        for attempt in (
            f"import socket\nsocket.create_connection({address!r}, timeout=1)",
            f"import _socket\n_socket.socket(2, 1).connect({address!r})",
            "import socket\nsocket.getaddrinfo('localhost', 80)",
            "import urllib.request\nurllib.request.urlopen('http://127.0.0.1')",
        ):
            assert not passes(attempt, "pass"), attempt
        thread.join()
    assert reached == []


@posix
def test_a_flood_of_output_is_not_read():
    start = time.monotonic()
    assert passes("for _ in range(200):\n    print('x' * 100_000)", "pass")
    # into every descriptor there is, the one for the secret word too
    flood = "import os\nfor fd in range(32):\n    try:\n        for _ in range(500): os.write(fd, b'x' * 4096)\n"
    assert not passes(flood + "    except OSError:\n        pass", "pass", Bounds(seconds=2))
    assert time.monotonic() - start < 5


@posix
def test_it_inherits_nothing(tmp_path):
    with open(tmp_path / "secret", "w+") as file:
        os.set_inheritable(file.fileno(), True)
        code = f"import os\ntry:\n    there = os.fstat({file.fileno()}).st_ino\nexcept OSError:\n    there = None"
        assert passes(code, f"assert there != {os.fstat(file.fileno()).st_ino}")


@posix
def test_text_beyond_reason_is_not_run(monkeypatch):
    monkeypatch.setattr(bounded.subprocess, "Popen", None)
    assert not passes("#" * (bounded.LONGEST + 1), "pass")


@posix
def test_the_limits_are_those_of_the_recipe():
    said = [f"```python\n{RIGHT}```", "```python\nwhile True: pass\n```"]
    assert rewards.code(said, [TESTS] * 2, Bounds(seconds=0.5)) == [1, 0]
