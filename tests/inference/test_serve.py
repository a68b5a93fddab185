"""`doge serve`: the official client drives it; transformers says the same; the command and its page."""

# ruff: noqa: F811

import re
import signal
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from small_doge import recipe as recipes
from small_doge.errors import UserError

pytest.importorskip("numba")
pytest.importorskip("fastapi")
pytest.importorskip("openai")
pytest.importorskip("uvicorn")

import openai
from served import MESSAGES, NAME, client, folder, running, served, server  # noqa: F401
from small import TEXT

from small_doge.inference.engine import Engine
from small_doge.inference.engine.text import Tokenizer
from small_doge.inference.serve import ServeRecipe
from small_doge.inference.serve import models as serving
from small_doge.inference.serve.jobs import Stops
from small_doge.inference.serve.run import listen, serve


def own_text(folder, ids, n):
    """What the engine itself says, greedily, and how many tokens that takes."""
    tokenizer, engine = Tokenizer(folder), Engine.open(folder, threads=1)
    tokens = list(engine.generate(ids, max_new_tokens=n))
    return tokenizer.decode(tokens), len(tokens)


def streamed(chunks, chat=True):
    pieces, reasons, usage = [], [], None
    for chunk in chunks:
        if chunk.choices:
            choice = chunk.choices[0]
            pieces.append((choice.delta.content if chat else choice.text) or "")
            reasons.append(choice.finish_reason)
        usage = chunk.usage or usage
    assert reasons[:-1] == [None] * (len(reasons) - 1)
    return pieces, reasons[-1], usage


def test_a_reply_is_the_engines_whole_or_streamed(client, served, folder):
    options = {"model": NAME, "messages": MESSAGES, "temperature": 0, "max_completion_tokens": 100}
    ids = served.chat(MESSAGES)
    want, count = own_text(folder, ids, 100)
    whole = client.chat.completions.create(**options)
    assert whole.choices[0].message.content == want
    assert whole.choices[0].message.role == "assistant"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(ids), count)
    assert whole.usage.total_tokens == len(ids) + count
    assert whole.choices[0].finish_reason == ("length" if count == 100 else "stop")
    chunks = client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    pieces, reason, usage = streamed(chunks)
    assert "".join(pieces) == want
    assert (reason, usage) == (whole.choices[0].finish_reason, whole.usage)
    asked = options | {"stream": True, "stream_options": {"continuous_usage_stats": True}}
    counts = [chunk.usage.completion_tokens for chunk in client.chat.completions.create(**asked)]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, count)


def test_a_text_is_continued_as_the_engine_does(client, served, folder):
    ids = Tokenizer(folder).encode(TEXT)
    want, count = own_text(folder, ids, 60)
    options = {"model": NAME, "temperature": 0, "max_tokens": 60}
    for prompt in (TEXT, [TEXT], ids, [ids]):
        answer = client.completions.create(prompt=prompt, **options)
        assert (answer.choices[0].text, answer.usage.completion_tokens) == (want, count)
    pieces, _, usage = streamed(client.completions.create(prompt=TEXT, stream=True, **options), chat=False)
    assert "".join(pieces) == want
    assert usage is None  # which was not asked for


def test_parts_developers_and_harmless_fields(client):
    plain = client.chat.completions.create(model=NAME, messages=MESSAGES, temperature=0, max_tokens=20)
    parts = [{"role": "developer", "content": "be brief"}]
    parts.append(
        {"role": "user", "content": [{"type": "text", "text": "who reads "}, {"type": "text", "text": "é 🐕?"}]}
    )
    more = {"n": 1, "user": "x", "logprobs": False, "frequency_penalty": 0.0, "response_format": {"type": "text"}}
    other = client.chat.completions.create(model=NAME, messages=parts, top_p=0, max_tokens=20, **more)
    assert other.choices[0].message.content == plain.choices[0].message.content


def test_seeds_repeat(client):
    def say(seed):
        options = {"temperature": 1.5, "top_p": 1, "max_tokens": 40, "extra_body": {"top_k": 200}}
        return client.completions.create(model=NAME, prompt=TEXT, seed=seed, **options).choices[0].text

    assert say(7) == say(7) != say(8)
    assert say(-3) == say(-3)


def test_stop_strings(client, folder):
    want, _ = own_text(folder, Tokenizer(folder).encode(TEXT), 100)
    middle = next(want[i : i + 3] for i in range(5, len(want) - 3) if "\ufffd" not in want[i : i + 3])
    options = {"model": NAME, "prompt": TEXT, "temperature": 0, "max_tokens": 100}
    for stop in (middle, ["never said by anyone", middle]):
        answer = client.completions.create(stop=stop, **options)
        assert answer.choices[0].text == want[: want.index(middle)]
        assert answer.choices[0].finish_reason == "stop"
        pieces, reason, _ = streamed(client.completions.create(stop=stop, stream=True, **options), chat=False)
        assert ("".join(pieces), reason) == (want[: want.index(middle)], "stop")
    # The end of the text may begin a stop string: it is not lost.
    answer = client.completions.create(stop=[want[-1] + "\0\0"], **options)
    assert answer.choices[0].text == want


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_stop_strings_never_leak(data):
    text = data.draw(st.text("abc", max_size=30))
    strings = data.draw(st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
    ends = [(text.find(s) + len(s), text.find(s)) for s in strings if s in text]
    want = text[: min(ends)[1]] if ends else text
    stops, given_, rest = Stops(strings), "", text
    while rest and not stops.reached:
        n = data.draw(st.integers(1, len(rest)))
        # All at once, a later stop string inside of the same piece changes nothing.
        given_ += stops.push(rest[:n])
        assert want.startswith(given_)
        rest = rest[n:]
    assert given_ + stops.end() == want
    assert stops.reached == bool(ends)


def test_a_conversation_goes_on_where_it_was(folder, monkeypatch):
    """What was said is not read again, and the replies are those of a server that reads everything."""
    read = []
    original = serving._EngineText.feed
    monkeypatch.setattr(serving._EngineText, "feed", lambda text, ids: read.append(len(ids)) or original(text, ids))
    found = {}
    for kept in (0, 2):
        with running(serving.open_served(ServeRecipe(str(folder), threads=1, kept_texts=kept)), folder) as server:
            client, ids, found[kept] = server.client(), Tokenizer(folder).encode(TEXT), []
            for i in range(3):
                read.clear()
                answer = client.completions.create(model=NAME, prompt=ids, temperature=0, max_tokens=20)
                cached = answer.usage.prompt_tokens_details.cached_tokens
                assert cached == (len(ids) - 3 if kept and i else 0)  # what was added, and the last token made
                assert sum(read) == len(ids) - cached
                found[kept].append(answer.choices[0].text)
                said = list(Engine.open(folder, threads=1).generate(ids, max_new_tokens=20))
                ids = [*ids, *said, 40 + i, 41]
                client.completions.create(model=NAME, prompt=[5, 6, 7], max_tokens=1)  # another comes in between
    assert found[0] == found[2]


def test_models(client):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="no such model"):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    ("changed", "kind", "param"),
    [
        ({"model": "gpt-9"}, openai.NotFoundError, "model"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, openai.BadRequestError, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, openai.BadRequestError, "messages.0.content"),
        ({"n": 2}, openai.BadRequestError, "n"),
        ({"logprobs": True}, openai.BadRequestError, "logprobs"),
        ({"frequency_penalty": 0.5}, openai.BadRequestError, "frequency_penalty"),
        ({"tools": [{"type": "function"}]}, openai.BadRequestError, "tools"),
        ({"temperature": 3}, openai.BadRequestError, "temperature"),
        ({"max_tokens": 401}, openai.BadRequestError, "max_tokens"),
        ({"max_completion_tokens": 0}, openai.BadRequestError, "max_completion_tokens"),
        ({"stop": [""]}, openai.BadRequestError, "stop.list.0"),
        ({"stream_options": {"include_usage": True}}, openai.BadRequestError, "stream_options"),
        ({"extra_body": {"typo": 1}}, openai.BadRequestError, "typo"),
        ({"messages": [{"role": "user", "content": "dog " * 3000}]}, openai.BadRequestError, "messages"),
    ],
)
def test_what_is_refused(client, changed, kind, param):
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**{"model": NAME, "messages": MESSAGES} | changed)
    assert caught.value.body.keys() == {"message", "type", "param", "code"}
    assert caught.value.param is not None
    assert caught.value.param.startswith(param.split(".list")[0])
    assert caught.value.type == "invalid_request_error"


def test_the_page_comes_from_here_and_holds_no_code_inline(server):
    for path, kind in [("/", "text/html"), ("/page.js", "text/javascript"), ("/page.css", "text/css")]:
        status, headers, content = server.ask(path + "?response=mine", method="GET")
        assert status == 200
        assert headers["Content-Type"].startswith(kind)
        assert "default-src 'none'; script-src 'self'" in headers["Content-Security-Policy"]
        assert "unsafe" not in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
        text = content.decode()
        assert not re.search(r"https?://|innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|localStorage", text)
        if path == "/":
            assert not re.search(r"<style|<script(?![^>]*\bsrc=)|\son\w+=|\sstyle=", text)


def test_transformers_says_the_same(folder, served, monkeypatch):
    monkeypatch.setattr(serving, "open_engine", lambda *_: None)
    other = serving.open_served(ServeRecipe(str(folder)))
    assert other.how.startswith("transformers, float32")
    with running(other, folder) as server:
        ids = served.chat(MESSAGES)
        want, count = own_text(folder, ids, 60)
        options = {"model": NAME, "messages": MESSAGES, "temperature": 0, "max_completion_tokens": 60}
        answer = server.client().chat.completions.create(**options)
        assert (answer.choices[0].message.content, answer.usage.completion_tokens) == (want, count)
        sampled = options | {"temperature": 1, "seed": 5, "extra_body": {"top_k": 50, "repetition_penalty": 1.2}}
        first, second = (server.client().chat.completions.create(**sampled) for _ in range(2))
        assert first.choices[0].message.content == second.choices[0].message.content


def test_the_command(folder):
    """It says where it is, answers, and ends at Ctrl-C."""
    command = [sys.executable, "-m", "small_doge", "serve", str(folder), "--port", "0", "--threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with process:
        try:
            line = process.stdout.readline()
            assert line.startswith(f"{NAME} at http://127.0.0.1:")
            assert "with the engine, float32, 1 thread" in line
            client = openai.OpenAI(base_url=line.split(" at ")[1].split(",")[0], api_key="none", max_retries=0)
            assert client.completions.create(model=NAME, prompt="a", max_tokens=3).usage.prompt_tokens > 0
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=30) in (130, 0)  # 0 where whoever runs the tests ignores Ctrl-C
            assert "Traceback" not in process.stderr.read()
        finally:
            process.kill()


def test_a_port_that_is_taken(folder):
    with listen("127.0.0.1", 0) as taken, pytest.raises(UserError, match="cannot listen at 127.0.0.1 port"):
        serve(ServeRecipe(str(folder), port=taken.getsockname()[1]))


@pytest.mark.parametrize(
    ("field", "value"), [("max_active", 0), ("port", 70000), ("temperature", 3), ("top_p", 0), ("max_seconds", 0)]
)
def test_recipes_out_of_range(field, value):
    with pytest.raises(UserError, match=f"`{field}` is {value}"):
        recipes.build(ServeRecipe, {"model": "m", field: value})
