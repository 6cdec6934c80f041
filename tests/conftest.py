"""Tiny real models, tokenizers and pairs. Everything is made here: no network, no file from elsewhere."""

import copy
import json
import os
import shutil
import tempfile

# before any Hugging Face import: a test that needs the Hub is a defect, and so is one that an earlier run's cache helps
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="resdpo-trl-tests-")

import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

TURNS = [
    "how do I keep basil alive in winter?",
    "my neighbour plays the trumpet at night, what can I say to her?",
    "is it safe to eat rice from yesterday?",
    "tell me something about comets",
    "what is the capital of Mongolia?",
    "I want to learn to whistle",
]
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# SmolLM2's template, with a shorter system turn
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are helpful<|im_end|>\\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ANSWERS = [
    "Keep it on a sunny sill and water it from below.",
    "Ask kindly, and offer an hour that suits you both.",
    "If it was cooled quickly and kept cold, yes.",
    "They are ice and dust, and their tails point away from the sun.",
    "Ulaanbaatar.",
    "Wet your lips, make a small O, and blow gently.",
    "No idea.",
    "Who cares about that, honestly?",
]


def write_pairs(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Dialogues of one to four exchanges in HH's form, written here; the chosen answer is the longer one."""
    generator = random.Random(seed)
    rows = []
    for number in range(count):
        prompt = ""
        for turn in range(generator.randint(1, 4)):
            opening = f"Question {number}: " if turn == 0 else ""
            prompt += f"\n\nHuman: {opening}{generator.choice(TURNS)}"
            prompt += f"\n\nAssistant: {generator.choice(ANSWERS)}" if turn < 3 else ""
        prompt = (
            prompt[: prompt.rindex("\n\nAssistant:")] if prompt.count("Human") == prompt.count("Assistant") else prompt
        )
        first, second = sorted(generator.sample(ANSWERS, 2), key=len)
        rows.append({"chosen": f"{prompt}\n\nAssistant: {second}", "rejected": f"{prompt}\n\nAssistant: {first}"})
    return rows


def pytest_sessionfinish():
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture
def hub(monkeypatch):
    """A Hub on the loopback interface, which this process then takes for the one; nobody waits in vain."""
    from huggingface_hub import constants

    from tests.hub_server import TOKEN, Hub

    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def dialogues() -> list[dict[str, str]]:
    return write_pairs(120)


@pytest.fixture(scope="session")
def tokenizer():
    """A base model's: no chat template, and <|endoftext|> for the end, the beginning and the padding."""
    return train_tokenizer(["\n\nHuman: \n\nAssistant:" * 20, *TURNS * 3, *ANSWERS * 3], 400)


@pytest.fixture(scope="session")
def _chat_tokenizer():
    found = train_tokenizer(["user\nassistant\nsystem\n" * 20, *TURNS * 3, *ANSWERS * 3], 400, [TURN_START, TURN_END])
    found.chat_template = CHATML
    return found


@pytest.fixture
def chat_tokenizer(_chat_tokenizer):
    """A chat model's: turns end with <|im_end|>, which is not its end of text. A copy, for its template may go."""
    return copy.deepcopy(_chat_tokenizer)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tokenizer):
    """A tiny GPT-2 of the base tokenizer, as save_pretrained writes it."""
    return save_model(tmp_path_factory.mktemp("model") / "base", tokenizer)


@pytest.fixture(scope="session")
def chat_model_folder(tmp_path_factory, _chat_tokenizer):
    """A tiny GPT-2 of the chat tokenizer."""
    return save_model(tmp_path_factory.mktemp("model") / "chat", _chat_tokenizer)


def train_tokenizer(texts, vocab_size: int, special_tokens=()):
    """A byte-level BPE like GPT-2's, trained on these texts; any text round-trips through it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, *special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


SENTENCEPIECE = ["legacy", "first", "always"]  # how a "▁" comes before a text, or before each part of one


def sentencepiece_tokenizer(kind: str, vocab_size: int = 400):
    """A BPE like Llama's, trained on the texts above: a space is "▁", and a text may begin with one more.

    `legacy` writes a "▁" before every part of a text by its normalizer, `first` before a text by its pre-tokenizer,
    `always` before every part.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if kind == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 256, special_tokens=special, initial_alphabet=["\n", "▁"], show_progress=False
    )
    words = [word for text in [*TURNS, *ANSWERS, "assistant : \n \n\n user :"] for word in text.split(" ")]
    tokenizer.train_from_iterator(words, trainer)
    state = json.loads(tokenizer.to_str())  # the bytes' tokens are no added ones
    state["model"]["vocab"] |= {f"<0x{byte:02X}>": len(state["model"]["vocab"]) + byte for byte in range(256)}
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def save_model(folder, tokenizer, kind: str = "gpt2", **changes):
    """A tiny model and its tokenizer, saved in a folder."""
    if kind == "gpt2":
        changes = {"n_layer": 1, "n_head": 2, "attn_pdrop": 0.0} | changes
    tiny_model(kind, **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_model(kind: str, vocab_size: int = 400, seed: int = 0, **changes):
    """A language model of a few thousand parameters whose logits are far from uniform."""
    from transformers import (
        AutoModelForCausalLM,
        GPT2Config,
        LlamaConfig,
        MistralConfig,
        Qwen3Config,
    )

    llama_like = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    config = {
        "gpt2": lambda: GPT2Config(
            **{"vocab_size": vocab_size, "n_positions": 256, "n_embd": 32, "n_layer": 2, "n_head": 4} | changes
        ),
        "llama": lambda: LlamaConfig(**llama_like | changes),
        "qwen3": lambda: Qwen3Config(**llama_like | {"head_dim": 8} | changes),
        "mistral": lambda: MistralConfig(**llama_like | {"sliding_window": 8} | changes),
    }[kind]()
    config.eos_token_id = config.bos_token_id = config.pad_token_id = 0
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def random_pairs(count: int, seed: int = 0, vocab_size: int = 400) -> list[dict[str, list[int]]]:
    """Tokenized pairs of every shape: one-token responses, long ones, prompts of one token."""
    generator = random.Random(seed)
    lengths = [(1, 1, 1), (1, 5, 30), (60, 1, 1), (40, 25, 2)]
    lengths += [tuple(generator.randint(1, 40) for _ in range(3)) for _ in range(count)]
    return [
        {
            f"{name}_ids": [generator.randrange(1, vocab_size) for _ in range(length)]
            for name, length in zip(("prompt", "chosen", "rejected"), shape, strict=True)
        }
        for shape in lengths[:count]
    ]


class Operators(TorchDispatchMode):
    """The operators that run inside the block, each with the types of its tensors."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        name = function.name().partition("::")[2].partition(".")[0]
        self.calls.append((name, {each.dtype for each in args if isinstance(each, torch.Tensor)}, args, found))
        return found
