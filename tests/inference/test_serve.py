"""`doge serve`: the official client drives it, requests take turns, whatever comes is answered properly."""

import contextlib
import gc
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from small_doge import recipe as recipes
from small_doge.data.tokenizer import TokenizerRecipe, load_tokenizer, train_tokenizer
from small_doge.errors import UserError
from small_doge.models import DogeForCausalLM, config_for

pytest.importorskip("numba")
pytest.importorskip("fastapi")
pytest.importorskip("openai")
pytest.importorskip("uvicorn")

import openai
import uvicorn

from small_doge.inference.engine import Engine
from small_doge.inference.engine.text import Tokenizer
from small_doge.inference.serve import ServeRecipe
from small_doge.inference.serve import models as serving
from small_doge.inference.serve.app import make_app
from small_doge.inference.serve.jobs import Stops
from small_doge.inference.serve.run import listen, serve, server_options
from small_doge.inference.serve.run import server as ending_server
from small_doge.inference.serve.scheduler import Scheduler

TEXT = "the dog reads é a long 中 book about small houses 🐕"
NAME = "small model"
MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "who reads é 🐕?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model with a small window, and a tokenizer of few entries, most of them bytes."""
    root = tmp_path_factory.mktemp("serve")
    (root / "corpus").mkdir()
    for i in range(40):
        (root / "corpus" / f"{i}.txt").write_text(f"{TEXT} {i} " * 8, encoding="utf-8")
    train_tokenizer(TokenizerRecipe(output_dir=str(root / "tokenizer"), corpus=str(root / "corpus"), vocab_size=300))
    tokenizer = load_tokenizer(root / "tokenizer")
    torch.manual_seed(0)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "keep_window_size": 24, "initializer_range": 0.3}
    DogeForCausalLM(config_for("tiny", vocab_size=300, **sizes, **special)).save_pretrained(root / NAME)
    tokenizer.save_pretrained(root / NAME)
    return root / NAME


@pytest.fixture(scope="module")
def served(folder):
    return serving.open_served(ServeRecipe(str(folder), threads=1))


class Running:
    """A server in a thread of its own, at a port of its own."""

    def __init__(self, served, folder, **options):
        self.recipe = ServeRecipe(str(folder), port=0, **options)
        self.scheduler = Scheduler(self.recipe.max_active, self.recipe.max_waiting, self.recipe.tokens_a_turn)
        self.listening = listen("127.0.0.1", 0)
        self.port = self.listening.getsockname()[1]
        app = make_app(self.recipe, served, self.scheduler)
        self.server = ending_server(uvicorn.Config(app, **server_options(self.recipe)), self.scheduler)
        self.thread = threading.Thread(target=self.server.run, args=([self.listening],), daemon=True)
        self.thread.start()
        wait_for(lambda: self.server.started)

    def client(self, key="none"):
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0, timeout=60)

    def ask(self, path, body=None, method="POST", headers=(), raw=None):
        """Status, headers and body of one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            data = raw if raw is not None else json.dumps(body).encode() if body is not None else None
            connection.request(method, path, data, {"Content-Type": "application/json", **dict(headers)})
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()

    def idle(self):
        return self.scheduler.counts() == (0, 0)

    def close(self):
        self.server.should_exit = True
        self.thread.join(timeout=20)
        self.scheduler.close()
        self.listening.close()
        assert not self.thread.is_alive()


def wait_for(condition, seconds=30):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come about"
        time.sleep(0.01)


@contextlib.contextmanager
def running(served, folder, **options):
    server = Running(served, folder, **options)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="module")
def server(served, folder):
    with running(served, folder, max_new_tokens=400, max_prompt_tokens=2000, max_body_bytes=20_000) as server:
        yield server


@pytest.fixture
def client(server):
    return server.client()


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


# ---- the official client --------------------------------------------------------------------------------------------


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


# ---- raw requests ---------------------------------------------------------------------------------------------------


def assert_proper(status, content, allowed=range(400, 500)):
    assert status in allowed
    error = json.loads(content)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[" * 10_000,
        b"null",
        b"[]",
        b"\xff\xfe",
        b'{"model": 1' + b"0" * 6000 + b"}",
        b'{"model": "small model", "prompt": "a\\ud800"}',
        b'{"model": "small model", "prompt": "a", "temperature": NaN}',
        b'{"model": "small model", "prompt": "a", "temperature": 1e999}',
        b'{"model": "small model", "prompt": [299, 300]}',
        b'{"model": "small model", "prompt": [-1]}',
        b'{"model": "small model", "prompt": [1, "a"]}',
        b'{"model": "small model", "prompt": []}',
        b'{"model": "small model", "prompt": ["a", "b"]}',
        b'{"model": "small model", "prompt": "a", "seed": 1e30}',
        b'{"model": "small model", "prompt": "a", "n\\ud800": 2}',
        b'{"model": "../../etc", "prompt": "a"}',
    ],
)
def test_bodies_that_are_none(server, raw):
    status, _, content = server.ask("/v1/completions", raw=raw)
    assert_proper(status, content)


def test_a_body_too_large(server):
    status, _, content = server.ask("/v1/completions", {"model": NAME, "prompt": "a" * 30_000})
    assert status == 413
    assert_proper(status, content)
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as raw:  # its length not said before
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        raw.sendall(b"Transfer-Encoding: chunked\r\n\r\n" + (b"1000\r\n" + b"a" * 4096 + b"\r\n") * 6)
        assert b" 413 " in raw.recv(4096).splitlines()[0]


def test_a_body_that_does_not_come(served, folder):
    with (
        running(served, folder, body_seconds=0.2) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=20) as raw,
    ):
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        raw.sendall(b"Content-Length: 100\r\n\r\n{")
        assert b" 408 " in raw.recv(4096).splitlines()[0]


def test_connections_that_say_nothing(served, folder):
    with running(served, folder, body_seconds=1.5, max_connections=3) as server:
        quiet = [socket.create_connection(("127.0.0.1", server.port), timeout=20) for _ in range(3)]
        quiet[0].sendall(b"GET /health HTTP/1.1\r\nHo")
        wait_for(lambda: len(server.server.server_state.connections) == 3)
        status, headers, content = server.ask("/v1/models", method="GET")
        assert status == 503
        assert headers["Retry-After"]
        assert_proper(status, content, [503])
        more = [socket.create_connection(("127.0.0.1", server.port), timeout=20) for _ in range(6)]
        for connection in (*quiet, *more):  # closed by the server, those that were too many at once
            with contextlib.suppress(ConnectionError):
                assert connection.recv(1000) == b""
            connection.close()
        assert server.ask("/v1/models", method="GET")[0] == 200


def test_other_types_names_and_methods(server):
    body = json.dumps({"model": NAME, "prompt": "a"}).encode()
    for headers, expected in [
        ({"Content-Type": "text/plain"}, 415),
        ({"Host": "evil.example"}, 421),
        ({"Host": "localhost.evil.example:80"}, 421),
        ({"Host": "localhost"}, 200),
        ({"Host": "[::1]:8000"}, 200),
    ]:
        status, _, content = server.ask("/v1/completions", raw=body, headers=headers)
        assert status == expected
        if expected != 200:
            assert_proper(status, content)
    assert server.ask("/v1/completions", method="GET")[0] == 405
    assert_proper(*server.ask("/v1/completions", method="GET")[::2])


@pytest.mark.parametrize(
    "path",
    [
        "/../config.json",
        "/page/../settings.py",
        "/%2e%2e/%2e%2e/pyproject.toml",
        "/..%2f..%2fetc/passwd",
        "//etc/passwd",
        "/v1/models/../../../etc/passwd",
        "/v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "/v1/models/" + "a" * 3000,
        "/config.json",
        "/model.safetensors",
        "/docs",
        "/static/%00",
    ],
)
def test_no_way_out_of_the_folder(server, path):
    status, _, content = server.ask(path, method="GET")
    assert status == 404
    assert_proper(status, content)


def test_keys(served, folder, monkeypatch):
    monkeypatch.setenv("DOGE_API_KEY", " open sesame\n")
    with running(served, folder, api_key="env") as server:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic sesame"}):
            for path in ("/v1/models", "/openapi.json", "//v1/models", "/nothing"):
                status, answered, content = server.ask(path, method="GET", headers=headers)
                assert status == 401
                assert answered["WWW-Authenticate"] == "Bearer"
                assert_proper(status, content)
        assert server.ask("/health", method="GET")[0] == 200
        assert server.client("open sesame").models.list().data[0].id == NAME
    with running(served, folder, api_key="sesame") as server:
        with pytest.raises(openai.AuthenticationError):
            server.client("wrong").models.list()
        assert server.client("sesame").models.list().data[0].id == NAME
    monkeypatch.delenv("DOGE_API_KEY")
    with pytest.raises(UserError, match="DOGE_API_KEY is not set"):
        serve(ServeRecipe(str(folder), api_key="env"))
    with pytest.raises(UserError, match="expected printable ASCII"):
        serve(ServeRecipe(str(folder), api_key="sésame"))


# ---- several at once ------------------------------------------------------------------------------------------------


class Slow:
    """A model whose tokens come only when they are let, one a permit."""

    def __init__(self, served):
        self.served, self.permits, self.made = served, threading.Semaphore(0), []
        self.says = list(range(20, 80))

    def __getattr__(self, name):
        return getattr(self.served, name)

    def keep(self, ids, text):
        pass

    def begin(self, ids):
        inner, outer = self.served.text(), self

        class Text:
            feed, seen = staticmethod(inner.feed), property(lambda self: inner.seen)

            def tokens(self, choice, most):
                for i in range(most):
                    outer.permits.acquire()
                    outer.made.append(choice.seed)
                    yield outer.says[i % len(outer.says)]

        return Text()


@pytest.fixture
def slow(served):
    slow = Slow(served)
    yield slow
    for _ in range(10_000):
        slow.permits.release()


def start(server, seed, stream=True, most=50):
    """A request whose answer is not read."""
    body = {"model": NAME, "prompt": "the dog", "seed": seed, "stream": stream, "max_tokens": most}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    return connection


def test_requests_take_turns(slow, folder):
    with running(slow, folder, max_active=2, tokens_a_turn=3) as server:
        asked = [start(server, 1)]
        wait_for(lambda: server.scheduler.counts()[0] == 1)
        asked.append(start(server, 2))
        wait_for(lambda: server.scheduler.counts()[0] == 2)
        for _ in range(100):
            slow.permits.release()
        wait_for(server.idle)
        assert sorted(slow.made) == [1] * 50 + [2] * 50
        # The second is not behind by more than what came before it was there, and a turn.
        second = [i for i, seed in enumerate(slow.made) if seed == 2]
        assert all(i <= 2 * (n + 1) + 9 for n, i in enumerate(second))
        for connection in asked:
            assert b"[DONE]" in connection.getresponse().read()
            connection.close()


def test_a_full_queue_answers_503(slow, folder):
    with running(slow, folder, max_active=1, max_waiting=1) as server:
        asked = [start(server, 1)]
        wait_for(lambda: server.scheduler.counts() == (1, 0))
        asked.append(start(server, 2, stream=False))
        wait_for(lambda: server.scheduler.counts() == (1, 1))
        status, headers, content = server.ask("/v1/completions", {"model": NAME, "prompt": "a", "stream": True})
        assert status == 503
        assert int(headers["Retry-After"]) > 0
        assert_proper(status, content, [503])
        with pytest.raises(openai.InternalServerError, match="come again"):
            server.client().completions.create(model=NAME, prompt="a")
        assert json.loads(server.ask("/health", method="GET")[2]) == {"status": "ok", "active": 1, "waiting": 1}
        asked[1].close()  # one that waits leaves: there is room at once
        wait_for(lambda: server.scheduler.counts() == (1, 0))
        asked[0].close()
        wait_for(lambda: slow.permits.release() or server.idle())
        assert set(slow.made) <= {1}


def test_one_that_waits_too_long(slow, folder):
    with running(slow, folder, max_active=1, max_seconds=1, tokens_a_turn=1) as server:
        first = start(server, 1)
        wait_for(lambda: server.scheduler.counts() == (1, 0))
        second = start(server, 2, stream=False)
        time.sleep(1.2)
        slow.permits.release()  # the turn ends, and with it the time of both
        answer = second.getresponse()
        assert_proper(answer.status, answer.read(), [503])
        events = first.getresponse().read()
        assert b'"finish_reason": "length"' in events
        assert events.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_its_text(slow, folder, stream):
    with running(slow, folder, tokens_a_turn=1) as server:
        connection = start(server, 1, stream, most=400)
        for _ in range(5):
            slow.permits.release()
        wait_for(lambda: len(slow.made) == 5)
        if stream:
            assert connection.getresponse().readline().startswith(b"data: ")
        connection.close()
        if connection.sock:
            connection.sock.close()
        wait_for(lambda: slow.permits.release() or server.idle())
        assert len(slow.made) < 400


def test_a_model_that_fails(served, folder, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no more memory")

    with running(served, folder) as server:
        monkeypatch.setattr(serving._EngineText, "feed", fail)
        status, _, content = server.ask("/v1/completions", {"model": NAME, "prompt": "a"})
        assert_proper(status, content, [500])
        assert b"memory" not in content
        _, _, content = server.ask("/v1/completions", {"model": NAME, "prompt": "a", "stream": True})
        assert "error" in json.loads(content.removeprefix(b"data: "))
        monkeypatch.undo()
        assert server.ask("/v1/completions", {"model": NAME, "prompt": "a", "max_tokens": 3})[0] == 200
    assert "no more memory" in capsys.readouterr().err


def test_many_at_once_and_nothing_stays(server, client, served):
    """32 clients, a quarter of which hang up; each other one gets the answer that it gets alone."""
    alone = client.completions.create(model=NAME, prompt=TEXT, temperature=0, max_tokens=30).choices[0].text
    found, crowd = [], 32

    def ask(i):
        try:
            if i % 4 == 0:
                body = {"model": NAME, "prompt": TEXT, "stream": True, "max_tokens": 400, "temperature": 0}
                connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
                connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
                with connection.getresponse() as answer:
                    answer.fp.readline()
                connection.close()
                return
            answer = server.client().completions.create(model=NAME, prompt=TEXT, temperature=0, max_tokens=30)
            found.append(answer.choices[0].text)
        except Exception as error:
            found.append(error)

    def crowd_asks():
        threads = [threading.Thread(target=ask, args=(i,)) for i in range(crowd)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        wait_for(server.idle)

    crowd_asks()
    assert found == [alone] * 24
    wait_for(lambda: texts_alive(served.engine) <= server.recipe.kept_texts)


def texts_alive(engine):
    gc.collect()
    return sum(type(thing) is serving._EngineText and thing._session.engine is engine for thing in gc.get_objects())


def test_texts_end_with_the_server(slow, folder):
    with running(slow, folder, max_active=1) as server:
        whole, streamed_ = start(server, 1, stream=False), start(server, 2)
        wait_for(lambda: server.scheduler.counts() == (1, 1))
        threading.Timer(0.3, lambda: [slow.permits.release() for _ in range(200)]).start()
    answer = whole.getresponse()
    assert_proper(answer.status, answer.read(), [503])
    assert b"server is ending" in streamed_.getresponse().read()


# ---- whatever fits the schema, nearly -------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def fitting(schema, known):
    """Values for a JSON schema as FastAPI writes it; anything at all where it says nothing."""
    if "$ref" in schema:
        return fitting(known[schema["$ref"].rpartition("/")[2]], known)
    if "anyOf" in schema:
        return st.one_of([fitting(option, known) for option in schema["anyOf"]])
    if "enum" in schema or "const" in schema:
        return st.sampled_from(schema.get("enum", [schema.get("const")]))
    kind = schema.get("type")
    if kind == "object":
        fields = {name: fitting(inner, known) for name, inner in schema.get("properties", {}).items()}
        required = set(schema.get("required", ()))
        return st.fixed_dictionaries(
            {name: fields[name] for name in fields if name in required},
            optional={name: fields[name] for name in fields if name not in required},
        )
    if kind == "array":
        return st.lists(fitting(schema["items"], known), min_size=schema.get("minItems", 0), max_size=3)
    low, high = schema.get("minimum", schema.get("exclusiveMinimum")), schema.get("maximum")
    if kind == "integer":
        return st.integers(low, 8 if low == 1 else high if high is not None else schema.get("exclusiveMaximum"))
    if kind == "number":
        return st.floats(low, high, allow_nan=False, exclude_min="exclusiveMinimum" in schema)
    return {
        "string": st.text(min_size=schema.get("minLength", 0), max_size=12),
        "boolean": st.booleans(),
        "null": st.none(),
    }.get(kind, JSON)


@pytest.fixture(scope="module")
def schemas(server):
    return json.loads(server.ask("/openapi.json", method="GET")[2])["components"]["schemas"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_comes_is_answered_properly(server, schemas, path, data):
    whole = schemas["ChatRequest" if "chat" in path else "CompletionRequest"]
    body = data.draw(fitting(whole, schemas))
    body |= {"max_tokens": data.draw(st.sampled_from([2, 1, None])) or 3} | {"model": NAME}
    wrong = data.draw(st.dictionaries(st.sampled_from(sorted(whole["properties"])), JSON, max_size=2))
    wrong |= data.draw(st.dictionaries(st.sampled_from(["n", "logprobs", "tools", "x"]), JSON, max_size=1))
    status, headers, content = server.ask(path, body | wrong)
    if status != 200:
        return assert_proper(status, content)
    if headers["Content-Type"].startswith("text/event-stream"):
        assert content.endswith(b"data: [DONE]\n\n")
    else:
        assert json.loads(content)["choices"][0]["finish_reason"] in ("stop", "length")


# ---- the page -------------------------------------------------------------------------------------------------------


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


# ---- transformers, and the command ----------------------------------------------------------------------------------


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
