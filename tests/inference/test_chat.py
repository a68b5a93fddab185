"""Chat: one cache for all turns, whole characters, commands, Ctrl-C stops a reply, base models are told apart."""

import functools
import io
import json
import os
import signal

import pytest
import torch

from small_doge.data.tokenizer import TokenizerRecipe, load_tokenizer, train_tokenizer
from small_doge.errors import UserError
from small_doge.inference import chat as module
from small_doge.inference.chat import CharacterStreamer, ChatRecipe, Conversation, EngineConversation, chat
from small_doge.inference.chat import open_conversation as opened
from small_doge.models import DogeForCausalLM, config_for

GREEDY = {"do_sample": False, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model with a small window, so that its cache drops keys in the second turn, and a tokenizer."""
    root = tmp_path_factory.mktemp("chat")
    (root / "corpus").mkdir()
    for i in range(40):
        (root / "corpus" / f"{i}.txt").write_text(
            f"the dog reads a long book about small houses {i} " * 8, encoding="utf-8"
        )
    train_tokenizer(TokenizerRecipe(output_dir=str(root / "tokenizer"), corpus=str(root / "corpus"), vocab_size=300))
    tokenizer = load_tokenizer(root / "tokenizer")
    torch.manual_seed(0)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "keep_window_size": 24, "initializer_range": 0.3}
    model = DogeForCausalLM(config_for("tiny", vocab_size=300, **sizes, **special))
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    return root / "model"


def answer_without_cache(talk, text):
    """The reply to a message from all tokens at once."""
    return answer_to(talk.model, talk._prompt(text))


def answer_to(model, prompt):
    inputs = torch.tensor([prompt])
    out = model.generate(inputs, attention_mask=torch.ones_like(inputs), **GREEDY)
    return out[0, inputs.shape[1] :].tolist()


def test_a_conversation_continues_in_its_cache(folder, monkeypatch):
    talk, read = Conversation.open(str(folder), system="be brief", options=GREEDY), []
    original = talk.model.model.forward
    monkeypatch.setattr(
        talk.model.model, "forward", lambda input_ids, **k: read.append(input_ids.shape[1]) or original(input_ids, **k)
    )
    lengths = []
    for text in ("who reads", "a book?", "x"):
        prompt = talk._prompt(text)
        cache, talk_ids = talk.cache, len(talk.ids)
        expected = answer_without_cache(talk, text)
        talk.cache = cache
        read.clear()
        talk.say(text)
        assert talk.ids[len(prompt) :][: len(expected)] == expected
        lengths.append((read[0], len(prompt), talk_ids))
    assert lengths[0][0] == lengths[0][1]  # all of the first prompt
    for new, whole, before in lengths[1:]:
        assert new <= whole - before + 2  # then the message, and what the last reply ended in
    assert [m["role"] for m in talk.messages] == ["system"] + ["user", "assistant"] * 3
    talk.reset()
    assert [m["role"] for m in talk.messages] == ["system"]
    assert talk.cache is None


def on_the_engine(folder, **options):
    pytest.importorskip("numba")
    recipe = ChatRecipe(str(folder), system="be brief", threads=1, **GREEDY | options)
    talk = opened(recipe)
    assert isinstance(talk, EngineConversation)
    return talk


def test_the_engine_says_the_same_and_reads_only_what_is_new(folder):
    """Past the window of 24 keys, over several turns, from one session."""
    ours, theirs = on_the_engine(folder), Conversation.open(str(folder), "be brief", GREEDY)
    session = None
    for text in ("who reads é 🐕", "a book?", "x"):
        shown, read = [], ours.cache.seen if ours.cache else 0
        reply = ours.say(text, shown.append)
        assert reply == theirs.say(text)
        assert ours.ids == theirs.ids
        assert "".join(shown).strip() == reply
        assert session in (None, ours.cache)
        session = ours.cache
        assert session.seen in (len(ours.ids) - 1, len(ours.ids) - 2)  # all but what ended the reply
        assert session.seen > read
        assert 0 < ours.new_tokens <= 12
    assert ours.messages == theirs.messages
    ours.reset()
    assert ours.cache is None


@pytest.mark.parametrize("kind", ["engine", "transformers"])
def test_regenerate(folder, kind):
    options = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 30}
    if kind == "engine":
        talk = on_the_engine(folder, seed=3, **options)
    else:
        torch.manual_seed(3)
        talk = Conversation.open(str(folder), "be brief", options)
    assert not talk.can_regenerate
    talk.say("one")
    before, first = list(talk.ids), talk.say("two")
    asked = talk._prompt("three")
    second = talk.regenerate()
    assert second != first
    assert [m["content"] for m in talk.messages[-2:]] == ["two", second]
    assert talk.ids[: len(before)] == before  # earlier replies keep their very tokens
    assert talk._prompt("three") != asked
    assert len(talk.messages) == 5
    talk.say("three")


def test_without_the_engine_it_is_said(folder, monkeypatch, capsys):
    from small_doge.inference import generate

    def refuse(*_, **__):
        from small_doge.inference.engine import Unsupported

        raise Unsupported("its layers are odd")

    pytest.importorskip("numba")
    monkeypatch.setattr("small_doge.inference.engine.Engine.open", refuse)
    talk = opened(ChatRecipe(str(folder), **GREEDY))
    assert type(talk) is Conversation
    assert "with transformers: the engine cannot run" in capsys.readouterr().err
    assert generate.open_engine is module.open_engine


def test_special_tokens_typed_by_the_user_stay_letters(folder):
    talk = Conversation.open(str(folder), options=GREEDY)
    ids = talk._prompt("<|end_of_text|>")
    assert ids.count(talk.tokenizer.eos_token_id) == 1


def test_characters_of_several_tokens_come_whole(folder):
    tokenizer, shown = load_tokenizer(folder), []
    stream = CharacterStreamer(tokenizer, shown.append)
    text = "a 🐕é中b"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) > len(text)
    stream.put(torch.tensor([[0, 5, 6]]))
    for i in ids:
        stream.put(torch.tensor([i]))
    assert "".join(shown) == text
    assert not any("\ufffd" in piece for piece in shown)
    stream.put(torch.tensor([ids[2]]))  # half a dog
    stream.end()
    assert "".join(shown) == text + "\ufffd"


def run(monkeypatch, lines, **options):
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
    # Not what sys.stdout gets: twice in whole runs of the tests something put another one there meanwhile.
    out = io.StringIO()
    monkeypatch.setattr(module, "print", functools.partial(print, file=out), raising=False)
    chat(ChatRecipe(max_new_tokens=4, seed=0, **options))
    return out.getvalue()


def test_commands(folder, monkeypatch):
    said = []
    original = Conversation.say
    monkeypatch.setattr(
        Conversation,
        "say",
        lambda self, text, show: said.append((text, len(self.messages))) or original(self, text, show),
    )
    out = run(monkeypatch, ["one", "", "two", "/reset", "three", "/what now", "/exit", "four"], model=str(folder))
    assert said == [("one", 0), ("two", 2), ("three", 0)]
    assert "/what is no command" in out
    assert "a new conversation" in out


def test_saving_and_asking_again(folder, monkeypatch, tmp_path):
    file = tmp_path / "talk.jsonl"
    (tmp_path / "taken").write_text("mine")
    lines = ["/regenerate", "one", "/regenerate", "/save", f"/save {file}", f"/save {tmp_path / 'taken'}"]
    out = run(monkeypatch, [*lines, f"/save {tmp_path / 'no' / 'x'}"], model=str(folder), system="be brief")
    assert "there is no reply yet" in out
    assert out.count("4 tokens, ") == 2
    assert out.count("tokens/s)") == 2
    assert "/save wants the name of a file" in out
    assert "is there already" in out
    assert "cannot be written: No such file" in out
    (row,) = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    assert [m["role"] for m in row["messages"]] == ["system", "user", "assistant"]
    assert (tmp_path / "taken").read_text() == "mine"


def test_it_ends_with_its_input(folder, monkeypatch):
    assert module.HELP in run(monkeypatch, ["one"], model=str(folder))


@pytest.mark.parametrize("kind", ["engine", "transformers"])
def test_ctrl_c_stops_the_reply_and_not_the_program(folder, kind):
    long = GREEDY | {"max_new_tokens": 200}
    other = Conversation.open(str(folder), "be brief", long)
    talk = on_the_engine(folder, max_new_tokens=200) if kind == "engine" else other
    pieces, before = [], signal.getsignal(signal.SIGINT)

    def show(text):
        pieces.append(text)
        if len(pieces) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with module._until_interrupted(talk.stop):
        talk.say("who", show)
    assert signal.getsignal(signal.SIGINT) is before
    assert len(pieces) >= 3
    assert len(talk.ids) < 100
    assert talk.ids[-1] == talk.tokenizer.eos_token_id
    prompt = talk._prompt("and?")
    expected = answer_to(other.model, prompt)
    talk.options = GREEDY
    talk.say("and?")
    assert talk.ids[len(prompt) :][: len(expected)] == expected


def change(folder, tmp_path):
    import shutil

    return shutil.copytree(folder, tmp_path / "other")


def test_a_base_model_is_told_apart(folder, tmp_path):
    other = change(folder, tmp_path)
    (other / "stage.json").write_text(json.dumps({"stage": "pretrain"}))
    with pytest.raises(UserError, match=r"holds a base model \(of `doge pretrain`\), expected one of `doge sft`"):
        chat(ChatRecipe(model=str(other)))


def test_a_model_without_a_template_is_refused(folder, tmp_path):
    other = change(folder, tmp_path)
    (other / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template"):
        chat(ChatRecipe(model=str(other)))


def test_no_model(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        chat(ChatRecipe(model=str(tmp_path / "nowhere")))


@pytest.mark.parametrize("field", ["max_new_tokens", "temperature", "top_p", "repetition_penalty"])
def test_options_out_of_range(field):
    with pytest.raises(ValueError, match=f"`{field}` is 0"):
        ChatRecipe(model="m", **{field: 0})
