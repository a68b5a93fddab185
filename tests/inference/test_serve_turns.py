"""`doge serve`: requests take turns, wait, leave and end."""

# ruff: noqa: F811

import gc
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
from served import (  # noqa: F401
    NAME,
    assert_proper,
    client,
    folder,
    running,
    served,
    server,
    slow,
    start,
    wait_for,
)
from small import TEXT

from small_doge.inference.serve import models as serving


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
