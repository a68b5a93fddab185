"""What the tests of `doge serve` share: a small model, a server in a thread, a model that waits to be let."""

import contextlib
import http.client
import json
import threading
import time

import pytest

pytest.importorskip("numba")
pytest.importorskip("fastapi")
pytest.importorskip("openai")
pytest.importorskip("uvicorn")

import openai
import uvicorn
from small import small_model

from small_doge.inference.serve import ServeRecipe
from small_doge.inference.serve import models as serving
from small_doge.inference.serve.app import make_app
from small_doge.inference.serve.run import listen, server_options
from small_doge.inference.serve.run import server as ending_server
from small_doge.inference.serve.scheduler import Scheduler

NAME = "small model"
MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "who reads é 🐕?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("serve"), NAME)


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


def assert_proper(status, content, allowed=range(400, 500)):
    assert status in allowed
    error = json.loads(content)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]


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
