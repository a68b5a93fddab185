"""`doge serve` answers whatever comes properly: bodies, names, paths, keys, and all that nearly fits its schema."""

# ruff: noqa: F811

import contextlib
import json
import socket

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from small_doge.errors import UserError

pytest.importorskip("numba")
pytest.importorskip("fastapi")
pytest.importorskip("openai")
pytest.importorskip("uvicorn")

import openai
from served import NAME, assert_proper, folder, running, served, server, wait_for  # noqa: F401

from small_doge.inference.serve import ServeRecipe
from small_doge.inference.serve.run import serve


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
