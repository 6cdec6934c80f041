import json

import pytest
import torch

from resdpo_trl.errors import UserError
from resdpo_trl.text.config import TextModelConfig
from resdpo_trl.text.generate import answer
from resdpo_trl.text.model import check_fits, check_same_tokenizer, load_model, load_tokenizer
from tests.conftest import tiny_model, train_tokenizer


def test_any_text_round_trips_through_the_trained_tokenizer(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    loaded = load_tokenizer(str(tmp_path), TextModelConfig(), False, "--model_name_or_path")
    for text in ("\n\nHuman: hello\n\nAssistant:", "naïve café 漢字 🙂\t\x00", ""):
        ids = loaded(text)["input_ids"]
        assert ids == tokenizer(text)["input_ids"]
        assert loaded.decode(ids) == text
    assert loaded.eos_token == "<|endoftext|>"


def test_answers_do_not_depend_on_the_batch(tokenizer):
    model = tiny_model("gpt2")
    prompts = [[5, 6, 7], [8], list(range(20, 40))]
    together = answer(model, tokenizer, prompts, 12, batch_size=8)
    assert together == answer(model, tokenizer, prompts, 12, batch_size=1)
    sampled = [answer(model, tokenizer, prompts, 12, sampled=True, seed=seed) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_pickled_weights_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(UserError, match=r"no safetensors.*save_pretrained"):
        load_model(str(tmp_path), TextModelConfig(), False, "--model_name_or_path")


@pytest.mark.parametrize(
    ("name", "message"),
    [("./nowhere", "no such folder"), ("gpt2", "not a local folder, and the Hub does not give it")],
)
def test_models_that_are_not_there(name, message):
    with pytest.raises(UserError, match=f"--model_name_or_path {name}: {message}"):
        load_tokenizer(name, TextModelConfig(), False, "--model_name_or_path")


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(UserError, match="not a model folder"):
        load_tokenizer(str(tmp_path), TextModelConfig(), False, "--sft_checkpoint")


def test_a_damaged_weights_file(tmp_path, tokenizer):
    tiny_model("gpt2").save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="can't be loaded"):
        load_model(str(tmp_path), TextModelConfig(), False, "--sft_checkpoint")


def test_weights_of_another_shape_than_the_configurations(tmp_path):
    tiny_model("gpt2").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_embd": 64}))
    with pytest.raises(UserError, match=r"--sft_checkpoint .*can't be loaded \(its weights have other shapes"):
        load_model(str(tmp_path), TextModelConfig(), False, "--sft_checkpoint")


@pytest.mark.parametrize("content", ["{}", "not JSON", '{"added_tokens": 5}', "[]", '{"added_tokens": [], "model": 1}'])
def test_a_malformed_tokenizer(tmp_path, content):
    tiny_model("gpt2").save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"--sft_checkpoint .*can't be loaded"):
        load_tokenizer(str(tmp_path), TextModelConfig(), False, "--sft_checkpoint")


def test_tokenizers_of_other_families(tokenizer):
    other = train_tokenizer(["something else entirely"], 300)
    check_same_tokenizer(tokenizer, "--model_name_or_path", tokenizer, "--sft_checkpoint")
    with pytest.raises(UserError, match="--sft_checkpoint has another tokenizer than --model_name_or_path"):
        check_same_tokenizer(tokenizer, "--model_name_or_path", other, "--sft_checkpoint")


def test_a_cap_beyond_the_models_positions(tokenizer):
    check_fits(tiny_model("gpt2"), tokenizer, 256)
    with pytest.raises(UserError, match="--max_length 257: the model has 256 positions"):
        check_fits(tiny_model("gpt2"), tokenizer, 257)
    check_fits(tiny_model("gpt2"), tokenizer, 256, max_new_tokens=248)
    with pytest.raises(UserError, match="--max_new_tokens 249: must leave 8 of the model's 256 positions"):
        check_fits(tiny_model("gpt2"), tokenizer, 256, max_new_tokens=249)
    with pytest.raises(UserError, match="do not belong together"):
        check_fits(tiny_model("gpt2", vocab_size=40), tokenizer, 64)


def test_the_fused_gelu_is_gpt2s(tmp_path):
    tiny_model("gpt2").save_pretrained(tmp_path)
    fused = load_model(str(tmp_path), TextModelConfig(), False, "--model_name_or_path").double().eval()
    plain = tiny_model("gpt2").double().eval()
    assert type(fused.transformer.h[0].mlp.act) is not type(plain.transformer.h[0].mlp.act)
    ids = torch.arange(1, 40)[None]
    torch.testing.assert_close(fused(ids).logits, plain(ids).logits, rtol=1e-10, atol=1e-10)
