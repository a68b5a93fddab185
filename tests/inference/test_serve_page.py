"""The chat page in a real browser: type, stream, stop, reload, a phone's width, dark, a key, nothing from elsewhere.

Chromium is driven over its debugging port. DOGE_SCREENSHOTS=FOLDER keeps the pictures.
"""

# ruff: noqa: F811

import asyncio
import base64
import contextlib
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

pytest.importorskip("numba")
pytest.importorskip("fastapi")
pytest.importorskip("openai")
pytest.importorskip("aiohttp")

import aiohttp
from served import NAME, folder, running, served, slow  # noqa: F401

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
HTML = "<img src=x onerror=alert(1)> <b>é 🐕</b> "


class Page:
    """One tab."""

    def __init__(self, socket):
        self.socket, self.n, self.answers, self.events = socket, 0, {}, []

    async def call(self, method, **parameters):
        self.n += 1
        await self.socket.send_json({"id": self.n, "method": method, "params": parameters})
        while self.n not in self.answers:
            message = json.loads((await asyncio.wait_for(self.socket.receive(), 30)).data)
            if "id" in message:
                self.answers[message["id"]] = message
            else:
                self.events.append(message)
        answer = self.answers.pop(self.n)
        assert "error" not in answer, answer
        return answer["result"]

    async def value(self, expression):
        result = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def until(self, expression):
        end = time.monotonic() + 60
        while not (found := await self.value(expression)):
            assert time.monotonic() < end, expression
            await asyncio.sleep(0.05)
        return found

    async def open(self, address):
        await self.call("Page.navigate", url=address)
        await self.until("document.readyState === 'complete' && typeof messages === 'object'")

    async def type(self, text, into="text"):
        await self.value(f"document.getElementById('{into}').focus()")
        await self.call("Input.insertText", text=text)

    async def enter(self):
        key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
        await self.call("Input.dispatchKeyEvent", type="keyDown", **key)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **key)

    async def click(self, name):
        box = f"JSON.stringify(document.getElementById('{name}').getBoundingClientRect())"
        box = json.loads(await self.value(box))
        assert box["width"] > 0, f"{name} is not to be seen"
        where = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2, "button": "left", "clickCount": 1}
        for kind in ("mousePressed", "mouseReleased"):
            await self.call("Input.dispatchMouseEvent", type=kind, **where)

    async def picture(self, name):
        data = base64.b64decode((await self.call("Page.captureScreenshot", format="png"))["data"])
        assert data.startswith(b"\x89PNG")
        if kept := os.environ.get("DOGE_SCREENSHOTS"):
            Path(kept).mkdir(parents=True, exist_ok=True)
            Path(kept, f"{name}.png").write_bytes(data)

    async def screen(self, width, height, scheme):
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        await self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])


@contextlib.asynccontextmanager
async def browser(tmp_path):
    profile = tmp_path / "profile"
    options = ["--headless=new", "--remote-debugging-port=0", f"--user-data-dir={profile}", "--no-first-run"]
    options += ["--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking", "--no-sandbox"]
    process = subprocess.Popen([BROWSER, *options, "about:blank"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        file, end = profile / "DevToolsActivePort", time.monotonic() + 60
        while not (file.is_file() and file.read_text().count("\n")):
            assert process.poll() is None, "Chromium did not start"
            assert time.monotonic() < end, "Chromium does not listen"
            await asyncio.sleep(0.1)
        port = file.read_text().split()[0]
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                tabs = await answer.json()
            address = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
            async with session.ws_connect(address, max_msg_size=0) as socket:
                page = Page(socket)
                for domain in ("Page", "Runtime", "Log", "Network"):
                    await page.call(f"{domain}.enable")
                yield page
    finally:
        process.terminate()
        process.wait(timeout=20)


def assert_clean(page, address, failures=0):
    """Nothing was asked of another place, nothing was blocked or failed."""
    asked = [e["params"]["request"]["url"] for e in page.events if e["method"] == "Network.requestWillBeSent"]
    assert asked
    assert all(url.startswith(address) for url in asked), asked
    wrong = [e["params"] for e in page.events if e["method"] == "Runtime.exceptionThrown"]
    wrong += [e["params"]["entry"] for e in page.events if e["method"] == "Log.entryAdded"]
    assert len(wrong) == failures, wrong


def test_a_conversation_on_the_page(slow, served, folder, tmp_path):
    slow.says = served.encode(HTML)[1:]

    async def scenario(server):
        address = f"http://127.0.0.1:{server.port}/"
        last = "[...document.querySelectorAll('article.assistant')].at(-1)"
        async with browser(tmp_path) as page:
            await page.screen(1000, 700, "light")
            await page.open(address)
            await page.until(f"document.getElementById('model').textContent === {json.dumps(NAME)}")
            await page.picture("1-empty")

            await page.type("who <b>reads</b>?")
            await page.enter()
            for _ in range(40):
                slow.permits.release()
            await page.until(f"{last}?.querySelector('p').textContent.length > 10")
            assert await page.value(f"{last}.classList.contains('busy')")
            await page.picture("2-streaming")
            await page.click("stop")
            await page.until(f"!{last}.classList.contains('busy')")
            assert "stopped" in await page.value(f"{last}.querySelector('small').textContent")
            end = time.monotonic() + 30
            while not server.idle():
                slow.permits.release()
                assert time.monotonic() < end, "the text went on"
                await asyncio.sleep(0.02)
            assert len(slow.made) < 300

            assert await page.value("document.querySelectorAll('#chat b, #chat img').length") == 0
            said = await page.value(f"{last}.querySelector('p').textContent")
            assert (HTML * 9).startswith(said)

            await page.call("Page.reload")
            await page.until("document.querySelectorAll('article').length === 2")
            assert await page.value(f"{last}.querySelector('p').textContent") == said
            assert await page.value("document.querySelectorAll('#chat b, #chat img').length") == 0
            await page.until(f"document.getElementById('model').textContent === {json.dumps(NAME)}")

            await page.screen(360, 640, "dark")
            await page.click("open")
            for field, value in {"system": "be brief", "max_tokens": "60", "temperature": "0.5"}.items():
                await page.type(value, field)
            await page.picture("3-settings-360-dark")
            assert await page.value("document.documentElement.scrollWidth") <= 360
            await page.click("open")
            await page.type("and " + "a" * 100 + "?")
            await page.click("send")
            for _ in range(300):
                slow.permits.release()
            note = await page.until(f"!{last}.classList.contains('busy') && {last}.querySelector('small').textContent")
            assert note.startswith("60 tokens, ")
            assert "tokens/s" in note
            assert "cut off" in note
            assert await page.value("document.querySelectorAll('article').length") == 4
            assert await page.value("document.documentElement.scrollWidth") <= 360
            await page.picture("4-answered-360-dark")

            sent = [e["params"]["request"] for e in page.events if e["method"] == "Network.requestWillBeSent"]
            body = json.loads([r for r in sent if r["method"] == "POST"][-1]["postData"])
            assert [m["role"] for m in body["messages"]] == ["system", "user", "assistant", "user"]
            assert (body["max_tokens"], body["temperature"]) == (60, 0.5)

            await page.click("new")
            assert await page.value("document.querySelectorAll('article').length") == 0
            assert await page.value("localStorage.length + document.cookie.length") == 0
            assert_clean(page, address)

    with running(slow, folder, tokens_a_turn=1) as server:
        asyncio.run(scenario(server))


def test_a_key_and_a_full_server(slow, folder, tmp_path):
    async def scenario(server):
        address = f"http://127.0.0.1:{server.port}/"
        async with browser(tmp_path) as page:
            await page.screen(360, 640, "light")
            await page.open(address)
            await page.until("document.getElementById('status').textContent.includes('API key')")
            await page.type("sesame", "key")
            await page.value("document.getElementById('text').focus()")
            await page.until(f"document.getElementById('model').textContent === {json.dumps(NAME)}")
            await page.picture("5-key-360-light")
            assert await page.value("sessionStorage.getItem('key')") == "sesame"
            await page.click("open")

            await page.value("fetch('v1/completions', {method: 'POST', headers: headers(), body: JSON.stringify("
                             "{model, prompt: 'a', stream: true})}).then(() => true)")  # fmt: skip
            await page.type("anyone?")
            await page.enter()
            await page.until("document.getElementById('status').textContent.includes('come again')")
            assert await page.value("document.getElementById('text').value") == "anyone?"  # nothing is lost
            assert await page.value("document.querySelectorAll('article').length") == 0
            await page.picture("6-full-360-light")
            assert_clean(page, address, failures=2)  # 401 and 503, as the browser notes them

    with running(slow, folder, api_key="sesame", max_active=1, max_waiting=0) as server:
        try:
            asyncio.run(scenario(server))
        finally:
            for _ in range(2000):
                slow.permits.release()
