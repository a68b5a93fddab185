"""Chat: one cache for all turns, whole characters, commands, Ctrl-C stops a reply, base models are told apart."""

import io
import json
import os
import signal

import pytest
import torch

from small_doge.data.tokenizer import TokenizerRecipe, load_tokenizer, train_tokenizer
from small_doge.errors import UserError
from small_doge.inference import chat as module
from small_doge.inference.chat import CharacterStreamer, ChatRecipe, Conversation, chat
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
    inputs = torch.tensor([talk._prompt(text)])
    out = talk.model.generate(inputs, attention_mask=torch.ones_like(inputs), **GREEDY)
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


def run(monkeypatch, capsys, lines, **options):
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
    chat(ChatRecipe(max_new_tokens=4, seed=0, **options))
    return capsys.readouterr().out


def test_commands(folder, monkeypatch, capsys):
    said = []
    original = Conversation.say
    monkeypatch.setattr(
        Conversation,
        "say",
        lambda self, text, show: said.append((text, len(self.messages))) or original(self, text, show),
    )
    out = run(
        monkeypatch, capsys, ["one", "", "two", "/reset", "three", "/what now", "/exit", "four"], model=str(folder)
    )
    assert said == [("one", 0), ("two", 2), ("three", 0)]
    assert "/what is no command" in out
    assert "a new conversation" in out


def test_it_ends_with_its_input(folder, monkeypatch, capsys):
    assert module.HELP in run(monkeypatch, capsys, ["one"], model=str(folder))


def test_ctrl_c_stops_the_reply_and_not_the_program(folder, monkeypatch, capsys):
    talk = Conversation.open(str(folder), options=GREEDY | {"max_new_tokens": 200})
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
    expected = answer_without_cache(talk, "and?")
    prompt = talk._prompt("and?")
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
