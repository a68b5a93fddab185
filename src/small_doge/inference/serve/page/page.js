// A chat over /v1/chat/completions of the server that this page came from. What was said is kept in this tab alone
// (sessionStorage), as is the API key. Text of the model is only ever set as textContent.
"use strict";

const at = (id) => document.getElementById(id);
const FIELDS = ["system", "temperature", "top_p", "max_tokens", "key"];
let messages = [];
let model = null;
let running = null; // an AbortController while a reply comes

function keep() {
  try {
    sessionStorage.setItem("messages", JSON.stringify(messages));
    for (const id of FIELDS) sessionStorage.setItem(id, at(id).value);
  } catch { /* storage is full or forbidden: the tab goes on without */ }
}

function restore() {
  try {
    for (const id of FIELDS) at(id).value = sessionStorage.getItem(id) ?? "";
    messages = JSON.parse(sessionStorage.getItem("messages") ?? "[]");
  } catch { messages = []; }
  for (const message of messages) show(message);
}

function tell(text, bad = false) {
  at("status").textContent = text;
  at("status").classList.toggle("bad", bad);
}

function headers() {
  const key = at("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function problem(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return `the server answered ${answer.status}`;
  }
}

async function ask_name() {
  try {
    const answer = await fetch("v1/models", { headers: headers() });
    if (answer.status === 401) {
      at("settings").hidden = false;
      at("open").setAttribute("aria-expanded", "true");
      return tell("This server asks for an API key: type it under Settings.");
    }
    if (!answer.ok) return tell(await problem(answer), true);
    model = (await answer.json()).data[0].id;
    at("model").textContent = model;
    tell("");
  } catch {
    tell("The server cannot be reached.", true);
  }
}

function show(message) {
  const article = document.createElement("article");
  article.className = message.role;
  const text = document.createElement("p");
  text.textContent = message.content;
  article.append(text);
  const note = document.createElement("small");
  if (message.role === "assistant") article.append(note);
  note.textContent = message.note ?? "";
  at("chat").append(article);
  at("chat").scrollTop = at("chat").scrollHeight;
  return { article, text, note };
}

function busy(controller) {
  running = controller;
  at("send").hidden = Boolean(controller);
  at("stop").hidden = !controller;
  at("new").disabled = Boolean(controller);
  at("chat").setAttribute("aria-busy", String(Boolean(controller)));
}

function body() {
  const system = at("system").value.trim();
  const said = messages.map(({ role, content }) => ({ role, content }));
  const options = {};
  for (const id of ["temperature", "top_p", "max_tokens"]) {
    if (at(id).value !== "") options[id] = Number(at(id).value);
  }
  return {
    model, ...options, stream: true, stream_options: { continuous_usage_stats: true },
    messages: system ? [{ role: "system", content: system }, ...said] : said,
  };
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      if (part === "data: [DONE]") return;
      if (part.startsWith("data: ")) yield JSON.parse(part.slice(6));
    }
  }
}

async function reply() {
  const message = { role: "assistant", content: "", note: "" };
  const { article, text, note } = show(message);
  article.classList.add("busy");
  const controller = new AbortController();
  busy(controller);
  let first = 0, last = 0, tokens_first = 0, tokens = 0, ending = "", failed = "";
  const speed = () => {
    const count = tokens - tokens_first, seconds = (last - first) / 1000; // from the first text that came to the last
    return seconds > 0 && count > 0 ? `${(count / seconds).toFixed(1)} tokens/s` : "";
  };
  try {
    const options = { method: "POST", headers: headers(), body: JSON.stringify(body()), signal: controller.signal };
    const answer = await fetch("v1/chat/completions", options);
    if (!answer.ok) throw new Error(await problem(answer));
    for await (const event of events(answer)) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) tokens = event.usage.completion_tokens;
      const choice = event.choices[0];
      if (choice?.delta?.content) {
        last = performance.now();
        if (!first) [first, tokens_first] = [last, tokens];
        message.content += choice.delta.content;
        const follow = at("chat").scrollHeight - at("chat").scrollTop - at("chat").clientHeight < 60;
        text.textContent = message.content;
        note.textContent = speed();
        if (follow) at("chat").scrollTop = at("chat").scrollHeight;
      }
      if (choice?.finish_reason === "length") ending = "cut off at its limit";
    }
  } catch (error) {
    if (controller.signal.aborted) ending = "stopped";
    else failed = error instanceof TypeError ? "the server cannot be reached" : error.message;
  }
  article.classList.remove("busy");
  note.classList.toggle("bad", Boolean(failed));
  message.note = [tokens ? `${tokens} tokens` : "", speed(), ending, failed].filter(Boolean).join(", ");
  note.textContent = message.note;
  if (failed && !message.content) {
    // Nothing came: the question goes back to where it was typed.
    const asked = messages.pop();
    if (!at("text").value) at("text").value = asked.content;
    article.previousElementSibling.remove();
    article.remove();
    tell(failed, true);
  } else {
    messages.push(message);
  }
  busy(null);
  keep();
  at("text").focus();
}

function fit() {
  at("text").style.height = "auto";
  at("text").style.height = `${at("text").scrollHeight + 2}px`;
}

at("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  const content = at("text").value.trim();
  if (!content || running) return;
  tell("");
  if (!model) await ask_name();
  if (!model) return;
  at("text").value = "";
  fit();
  const message = { role: "user", content };
  messages.push(message);
  show(message);
  keep();
  await reply();
});

at("text").addEventListener("input", fit);
at("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("ask").requestSubmit();
  }
});
at("stop").addEventListener("click", () => running?.abort());
at("new").addEventListener("click", () => {
  messages = [];
  at("chat").replaceChildren();
  tell("");
  keep();
  at("text").focus();
});
at("open").addEventListener("click", () => {
  at("settings").hidden = !at("settings").hidden;
  at("open").setAttribute("aria-expanded", String(!at("settings").hidden));
});
at("settings").addEventListener("change", keep);
at("settings").addEventListener("submit", (event) => event.preventDefault());
at("key").addEventListener("change", ask_name);

restore();
ask_name();
at("text").focus();
