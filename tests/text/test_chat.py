"""A chat with tiny models: what each reads, what is shown of what it writes, and what it remembers."""

import copy
import io
import os
import signal

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from resdpo_trl.errors import UserError
from resdpo_trl.text import chat as module
from resdpo_trl.text.chat import AnswerStreamer, Chat
from resdpo_trl.text.config import ChatConfig, ChatModelConfig
from resdpo_trl.training.signals import Interrupted
from tests.conftest import CHATML, TURN_END, save_model, tiny_model


@pytest.fixture(scope="module")
def folders(tokenizer, _chat_tokenizer, tmp_path_factory):
    """first and second with a chat template whose end of turn is not the end of text, plain without."""
    base = tmp_path_factory.mktemp("models")
    save_model(base / "first", _chat_tokenizer)
    save_model(base / "second", _chat_tokenizer, "llama", seed=1)
    save_model(base / "plain", tokenizer, seed=3)
    return base


def chat_with(folders, *names, **changes):
    config = ChatConfig(models=[f"{name}={folders / name}" for name in names], **{"max_new_tokens": 12} | changes)
    return Chat(config, ChatModelConfig(dtype="float32"))


def reading(tokenizer, messages, system=None):
    """Token ids of a conversation by transformers alone: user, assistant, user, …"""
    before = [{"role": "system", "content": system}] if system else []
    roles = ["user", "assistant"] * len(messages)
    said = [{"role": role, "content": text} for role, text in zip(roles, messages, strict=False)]
    return tokenizer.apply_chat_template(before + said, add_generation_prompt=True)["input_ids"]


def generated(folder, ids, new=12, model=None):
    """The greedy answer's text by transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = (model or AutoModelForCausalLM.from_pretrained(folder)).eval()
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(TURN_END)]
    ids = torch.tensor([ids])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, eos_token_id=ends
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


def saying(tokenizer, prompt, text, folder):
    """Save a model that answers a prompt of this many tokens with this text: at each position one token is likely.

    The embedding of position `prompt - 1 + i` is the i-th unit vector, the head maps it to the text's i-th token, and
    the one block between them adds nothing.
    """
    script = tokenizer(text, add_special_tokens=False)["input_ids"]
    model = tiny_model(
        "gpt2", vocab_size=len(tokenizer), n_embd=len(script) + 1, n_head=1, n_layer=1, tie_word_embeddings=False
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if name.endswith("ln_f.weight") else 0.0)
        for place, token in enumerate(script):
            model.transformer.wpe.weight[prompt - 1 + place, place] = 1.0
            model.lm_head.weight[token, place] = 1.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return script


def say_to(tokenizer, text, folder, said="hi", **changes):
    """A chat with a model that answers `said` with `text`."""
    save_model(folder / "script", tokenizer, vocab_size=len(tokenizer))
    prompt, _ = chat_with(folder, "script", **changes).speakers[0].prompt(said)
    script = saying(tokenizer, len(prompt), text, folder / "script")
    return chat_with(folder, "script", **{"max_new_tokens": len(script) + 5} | changes)


def test_each_model_reads_the_conversation_with_its_own_answers(folders, capsys):
    chat = chat_with(folders, "first", "second", system="Be brief.")
    asked = ["What is rain?", "Why?", "Größer 你好"]
    answers = {"first": [], "second": []}
    for number, message in enumerate(asked):
        chat.ask(message)
        for speaker in chat.speakers:
            turns = [turn for pair in zip(asked, answers[speaker.name], strict=False) for turn in pair]
            expected = reading(speaker.tokenizer, [*turns, message], "Be brief.")
            before = copy.copy(speaker)
            before.history = speaker.history[:number]
            assert before.prompt(message) == (expected, 0)
            answers[speaker.name].append(generated(folders / speaker.name, expected))
    assert answers["first"] != answers["second"]
    for speaker in chat.speakers:
        assert speaker.history == list(zip(asked, answers[speaker.name], strict=True))
    shown = capsys.readouterr().out
    for number in range(3):
        for name in answers:
            assert f"{name}:\n{module.printable(answers[name][number], kept=chr(10) + chr(9))}\n" in shown


def test_an_answer_is_streamed_and_ends_up_as_generate_writes_it(folders):
    for name in ("first", "second"):
        (speaker,) = chat_with(folders, name).speakers
        ids, _ = speaker.prompt("What is rain?")
        pieces = []
        speaker.answer(ids, "What is rain?", 0, pieces.append)
        assert "".join(pieces) == generated(folders / name, ids) == speaker.history[0][1]
        assert sum(map(bool, pieces)) > 3


def test_a_character_of_several_tokens_is_written_once_it_is_whole(chat_tokenizer, tmp_path):
    text = "你好 🙂🙃, größer"
    chat = say_to(chat_tokenizer, text, tmp_path)
    (speaker,) = chat.speakers
    pieces = []
    assert not speaker.answer(speaker.prompt("hi")[0], "hi", 0, pieces.append)
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)
    assert "🙂" in pieces  # it does not wait for the next blank


def test_an_answer_ends_at_the_templates_end_of_turn(chat_tokenizer, tmp_path, capsys):
    chat = say_to(chat_tokenizer, "Yes.<|im_end|>\n<|im_start|>user\nMore", tmp_path)
    capsys.readouterr()
    chat.ask("hi")
    assert capsys.readouterr() == ("Yes.\n", "")
    assert chat.speakers[0].history == [("hi", "Yes.")]


def test_an_end_of_turn_that_decoding_does_not_skip_is_no_part_of_an_answer(chat_tokenizer, tmp_path, capsys):
    chat_tokenizer.add_tokens("</turn>")  # an added token, not a special one
    chat_tokenizer.chat_template = CHATML.replace(TURN_END, "</turn>")
    chat = say_to(chat_tokenizer, "Yes.</turn>More", tmp_path)
    capsys.readouterr()
    chat.ask("hi")
    assert capsys.readouterr() == ("Yes.\n", "")
    assert chat.speakers[0].history == [("hi", "Yes.")]


def test_without_a_template_an_answer_ends_at_the_users_next_turn(tokenizer, tmp_path, capsys):
    text = " Yes.\n\nHumor helps.\n\nHuman: And then?\n\nAssistant: No."
    chat = say_to(tokenizer, text, tmp_path)
    (speaker,) = chat.speakers
    ids, _ = speaker.prompt("hi")
    assert ids == tokenizer("\n\nHuman: hi\n\nAssistant:")["input_ids"]
    pieces = []
    assert not speaker.answer(ids, "hi", 0, pieces.append)
    assert "".join(pieces) == "Yes.\n\nHumor helps."
    assert speaker.prompt("Why?")[0] == tokenizer(
        "\n\nHuman: hi\n\nAssistant: Yes.\n\nHumor helps.\n\nHuman: Why?\n\nAssistant:"
    )["input_ids"]  # fmt: skip
    # where the text that ends it needs the last token there is room for, it has ended all the same
    speaker.history.clear()
    speaker.config.max_new_tokens = len(tokenizer(text.partition(" And")[0])["input_ids"])
    assert not speaker.answer(ids, "hi", 0, pieces.append)
    speaker.config.max_new_tokens -= 1
    pieces.clear()
    assert speaker.answer(ids, "hi", 0, pieces.append)
    assert "".join(pieces).startswith("Yes.\n\nHumor helps.\n\nHuman")  # cut: what was held back is part of it


def test_what_a_terminal_would_obey_is_not_printed(chat_tokenizer, tmp_path, capsys):
    chat = say_to(chat_tokenizer, "a\x1b[2Jb\rc\x07\u202ed\n\te", tmp_path)
    chat.ask("hi")
    assert capsys.readouterr().out == "a�[2Jb�c��d\n\te\n"
    assert chat.speakers[0].history == [("hi", "a\x1b[2Jb\rc\x07\u202ed\n\te")]


def test_an_answer_that_was_cut_is_remarked_on(folders, capsys):
    chat = chat_with(folders, "first", max_new_tokens=2)
    capsys.readouterr()  # transformers' progress bar of loading
    chat.ask("What is rain?")
    assert capsys.readouterr().err == "(first's answer was truncated at --max_new_tokens 2)\n"


def test_the_oldest_turns_go_where_there_is_no_room(folders, capsys):
    chat = chat_with(folders, "first", system="Be brief.", max_new_tokens=8)
    (speaker,) = chat.speakers
    speaker.room = 120
    while "does not see" not in (said := capsys.readouterr().err):
        before = list(speaker.history)
        chat.ask("What is rain?")
    turns = [turn for exchange in before for turn in exchange]
    whole = reading(speaker.tokenizer, [*turns, "What is rain?"], "Be brief.")
    system = len(reading(speaker.tokenizer, ["What is rain?"], "Be brief.")) - len(turn_of(speaker.tokenizer))
    kept = next(
        whole[:system] + whole[start:]
        for start in range(system, len(whole))
        if whole[start] == whole[0] and system + len(whole) - start <= 120
    )
    assert f"(first does not see the oldest {len(whole) - len(kept)} tokens of the conversation; /reset" in said
    assert speaker.history[-1] == ("What is rain?", generated(speaker.path, kept, 8))
    assert speaker.history[:-1] == before


def turn_of(tokenizer):
    """The question's turn and what asks for an answer."""
    text = "<|im_start|>user\nWhat is rain?<|im_end|>\n<|im_start|>assistant\n"
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_room_is_what_an_answer_leaves_of_the_positions(folders):
    assert chat_with(folders, "first", max_new_tokens=20).speakers[0].room == 256 - 20


def test_an_adapter_answers(folders, chat_tokenizer, tmp_path):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folders / "first")
    adapted = get_peft_model(base, LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    chat_tokenizer.save_pretrained(tmp_path / "adapter")
    (speaker,) = chat_with(tmp_path, "adapter").speakers
    ids, _ = speaker.prompt("What is rain?")
    speaker.answer(ids, "What is rain?", 0, str)
    merged = adapted.merge_and_unload()
    assert speaker.history[0][1] == generated(tmp_path / "adapter", ids, model=merged)
    assert speaker.history[0][1] != generated(folders / "first", ids)


def test_drawn_answers_follow_the_seed_and_change_with_each_message(folders):
    def answers(seed, **drawn):
        chat = chat_with(folders, "first", seed=seed, do_sample=True, **{"temperature": 2.0} | drawn)
        found = []
        for _ in range(2):
            chat.ask("What is rain?")
            found.append(chat.speakers[0].history[-1][1])
            chat.obey("/reset")
        return found

    first = answers(1)
    assert first == answers(1) and first[0] != first[1]
    assert answers(2)[0] == first[1]  # the second message is answered by seed + 1
    greedy = chat_with(folders, "first")
    greedy.ask("What is rain?")
    for sharp in ({"temperature": 1e-6}, {"top_p": 1e-9}):
        assert answers(1, **sharp)[0] == greedy.speakers[0].history[0][1] != first[0]


def talk(chat, monkeypatch, text):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    chat.talk()


def test_commands(folders, monkeypatch, capsys):
    chat = chat_with(folders, "first", "plain")
    talk(chat, monkeypatch, "What is rain?\n\n  \n /quit is a word\n/nonsense at all\n/help\n")
    assert [asked for asked, _ in chat.speakers[0].history] == ["What is rain?", "/quit is a word"]
    said = capsys.readouterr()
    assert "(unknown command /nonsense at all; /help lists them)" in said.err and "/reset" in said.out
    assert f"first  {folders / 'first'} (float32, cpu)\n" in said.out
    assert f"plain  {folders / 'plain'} (float32, cpu, no chat template: \\n\\nHuman: … \\n\\nAssistant:)" in said.out
    talk(chat, monkeypatch, "/reset\nWhy?\n/quit\nWhat is rain?\n")
    for speaker in chat.speakers:
        assert [asked for asked, _ in speaker.history] == ["Why?"]
    fresh = chat_with(folders, "first", "plain")
    fresh.ask("Why?")
    assert [speaker.history for speaker in fresh.speakers] == [speaker.history for speaker in chat.speakers]


def test_ctrl_c_stops_an_answer_and_keeps_what_was_written(folders, monkeypatch, capsys):
    chat = chat_with(folders, "first", "second", "plain")
    whole = generated(folders / "second", reading(chat.speakers[1].tokenizer, ["What is rain?"]))
    put, count = AnswerStreamer.put, 0

    class Pressed:
        def __del__(self):  # Python ignores an exception that is raised here
            os.kill(os.getpid(), signal.SIGINT)

    def press(self, value):
        nonlocal count
        put(self, value)
        if self.tokenizer is chat.speakers[1].tokenizer:
            count += 1
            if count == 5:  # the prompt and four tokens
                Pressed()

    monkeypatch.setattr(AnswerStreamer, "put", press)
    capsys.readouterr()
    talk(chat, monkeypatch, "What is rain?\nWhy?\n")
    assert capsys.readouterr().err.count("(stopped)") == 1
    histories = [[asked for asked, _ in speaker.history] for speaker in chat.speakers]
    assert histories == [["What is rain?", "Why?"], ["What is rain?", "Why?"], ["Why?"]]
    stopped = chat.speakers[1].history[0][1]
    assert stopped and whole.startswith(stopped) and stopped != whole


def test_a_stopped_answer_is_shown_as_far_as_it_is_remembered(tokenizer, tmp_path, monkeypatch, capsys):
    chat = say_to(tokenizer, " Yes.\n\nHumor helps.", tmp_path)
    put = AnswerStreamer.put

    def press(self, value):
        put(self, value)
        if self.written < len(self.text):  # the beginning of "\n\nHuman:" is held back
            raise KeyboardInterrupt

    monkeypatch.setattr(AnswerStreamer, "put", press)
    talk(chat, monkeypatch, "hi\n")
    ((_, stopped),) = chat.speakers[0].history
    assert stopped.startswith("Yes.\n\nH") and f"{stopped}\n" in capsys.readouterr().out


def test_a_message_that_no_token_answers_is_forgotten(folders, monkeypatch):
    chat = chat_with(folders, "first")

    def press(self, value):
        raise KeyboardInterrupt

    monkeypatch.setattr(AnswerStreamer, "put", press)  # at the prompt
    talk(chat, monkeypatch, "hi\n")
    assert chat.speakers[0].history == []


@pytest.mark.parametrize("pressed", [KeyboardInterrupt(), EOFError()])
def test_ctrl_c_and_ctrl_d_at_the_prompt_end_the_chat(folders, monkeypatch, pressed):
    chat = chat_with(folders, "first")
    said = iter(["hi"])

    def prompt(_):
        for line in said:
            return line
        raise pressed

    monkeypatch.setattr("builtins.input", prompt)
    chat.talk()
    assert len(chat.speakers[0].history) == 1


def test_sigterm_is_no_ctrl_c(folders, monkeypatch):
    chat = chat_with(folders, "first")

    def terminated(self, value):
        raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(AnswerStreamer, "put", terminated)
    with pytest.raises(Interrupted) as stop:
        talk(chat, monkeypatch, "hi\n")
    assert stop.value.status == 143


def test_a_template_that_refuses_is_named_before_a_model_is_loaded(folders, chat_tokenizer, tmp_path, monkeypatch):
    chat_tokenizer.chat_template = "{% if messages[2:] %}{{ raise_exception('one question') }}{% endif %}" + CHATML
    save_model(tmp_path / "strict", chat_tokenizer)
    monkeypatch.setattr(module, "load_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UserError, match=r"--models strict .*rejects the conversation.*one question"):
        chat_with(tmp_path, "strict")
    with pytest.raises(UserError, match="--system: plain has no chat template"):
        chat_with(folders, "first", "plain", system="Be brief.")


def test_half_a_surrogate_pair_is_no_message(folders):
    with pytest.raises(UserError, match="the message is not UTF-8"):
        chat_with(folders, "first").ask("h\udcff")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": ["a"]}, "--models a: needs NAME=PATH"),
        ({"models": ["a=x", "a=y"]}, "the name a is given twice"),
        ({"prompt": " \n"}, "--prompt is empty"),
        ({"system": ""}, "--system is empty"),
        ({"max_new_tokens": 0}, "--max_new_tokens 0: must be at least 1"),
        ({"do_sample": True, "temperature": 0.0}, "--temperature 0.0: must be above 0"),
        ({"do_sample": True, "top_p": 1.5}, r"--top_p 1.5: must be in \(0, 1\]"),
        ({"temperature": 0.7}, "only affect sampling: add --do_sample"),
        ({"seed": -1}, "--seed -1: must be between"),
    ],
)
def test_senseless_options_name_the_flag(changes, message):
    with pytest.raises(UserError, match=message):
        ChatConfig(**changes)


def test_precision_is_the_hardwares_unless_it_is_named(monkeypatch):
    for has, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr("resdpo_trl.text.config.has_bfloat16", lambda has=has: has)
        assert ChatModelConfig().dtype == expected
        assert ChatModelConfig(dtype="float16").dtype == "float16"
