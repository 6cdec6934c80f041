import json

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from resdpo_trl.text import attention as module
from resdpo_trl.text.attention import ATTENTION, _Attention, attention, block_mask
from resdpo_trl.text.tokens import PairCollator
from tests.conftest import Operators, random_pairs, tiny_model


def causal(rows, length):
    return torch.ones(length, length, dtype=torch.bool).tril().expand(rows, 1, length, length)


def masks(rows, length):
    """As a batch of shared prompts has them, and one that is not causal."""
    shared = causal(rows, length).clone()
    shared[:, :, length - 3 :, 2:5] = False
    return {"causal": causal(rows, length), "shared prompt": shared, "everything": torch.ones_like(shared)}


@pytest.mark.parametrize("kind", ["causal", "shared prompt", "everything"])
@pytest.mark.parametrize(("length", "key_heads"), [(2, 4), (9, 4), (9, 2)])
def test_the_gradient_is_the_numerical_one(kind, length, key_heads):
    torch.manual_seed(0)
    heads = (4, key_heads, key_heads)
    inputs = [torch.randn(2, count, length, 4, dtype=torch.float64, requires_grad=True) for count in heads]
    hidden = ~masks(2, max(length, 9))[kind][..., :length, :length]
    torch.autograd.gradcheck(lambda *values: _Attention.apply(*values, hidden, 0.3), inputs)


@pytest.mark.parametrize("kind", ["causal", "shared prompt", "everything", None])
@pytest.mark.parametrize("heads", [4, 2], ids=["own keys", "grouped keys"])
def test_it_is_sdpas_to_bfloat16(kind, heads):
    """Values and gradients against SDPA's in float32, about as near as SDPA's own in bfloat16 are."""
    torch.manual_seed(0)
    module = torch.nn.Module()
    module.num_key_value_groups = 4 // heads
    mask = None if kind is None else masks(2, 33)[kind]
    exact = [torch.randn(2, count, 33, 16) for count in (4, heads, heads)]
    found = {}
    for name, function, dtype in (
        ("exact", sdpa_attention_forward, torch.float32),
        ("sdpa", sdpa_attention_forward, torch.bfloat16),
        ("ours", attention, torch.bfloat16),
    ):
        inputs = [value.to(dtype).requires_grad_() for value in exact]
        out, _ = function(module, *inputs, mask)
        gradients = torch.autograd.grad((out.float() * torch.linspace(-1, 1, 16)).sum(), inputs)
        found[name] = [out, *gradients]
    for exactly, sdpas, ours in zip(found["exact"], found["sdpa"], found["ours"], strict=True):
        assert ours.shape == sdpas.shape and ours.dtype == torch.bfloat16
        error = (ours.float() - exactly).norm() / exactly.norm()
        assert error < 2 * (sdpas.float() - exactly).norm() / exactly.norm() < 0.05


def test_it_is_taken_where_it_is_the_faster(monkeypatch):
    calls = []
    monkeypatch.setattr("resdpo_trl.text.attention.sdpa_attention_forward", lambda *args, **kwargs: calls.append(args))
    module, value = torch.nn.Module(), torch.randn(1, 2, 5, 4)
    low = value.bfloat16()
    attention(module, low, low, low, None)
    with torch.autocast("cpu", torch.bfloat16):
        attention(module, value, value, value, causal(1, 5))
    assert not calls
    attention(module, value, value, value, None)  # float32
    attention(module, low[:, :, :1], low, low, None)  # an answer's next token
    attention(module, low, low, low, None, dropout=0.1)
    attention(module, low, low, low, torch.zeros(1, 1, 5, 5, dtype=torch.bfloat16))  # an additive mask
    attention(module, low, low, low, None, is_causal=False)
    assert len(calls) == 5


def test_rows_that_see_nothing_stay_finite():
    values = [torch.randn(1, 1, 6, 4).bfloat16().requires_grad_() for _ in range(3)]
    mask = causal(1, 6).clone()
    mask[..., :3] = False  # padding on the left
    out, _ = attention(torch.nn.Module(), *values, mask)
    out.sum().backward()
    assert all(value.grad.isfinite().all() for value in values)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_model_with_it_scores_as_with_sdpa(kind, tmp_path):
    model = tiny_model(kind).bfloat16().eval()
    batch = PairCollator(0)(random_pairs(6, seed=0))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    expected = model(**inputs).logits.float().log_softmax(-1)
    model.set_attn_implementation(ATTENTION)
    torch.testing.assert_close(model(**inputs).logits.float().log_softmax(-1), expected, atol=0.05, rtol=0)
    model.save_pretrained(tmp_path)
    assert ATTENTION not in json.dumps(json.loads((tmp_path / "config.json").read_text()))


def test_grouped_queries_with_a_mask_copy_no_keys():
    """Values and gradients are those of transformers' SDPA, which repeats keys and values before it; counted."""
    torch.manual_seed(0)
    layer = torch.nn.Module()
    layer.num_key_value_groups = 2
    inputs = [torch.randn(2, count, 33, 16, requires_grad=True) for count in (4, 2, 2)]
    mask, found, copies = masks(2, 33)["shared prompt"], [], []
    for function in (sdpa_attention_forward, attention):
        with Operators() as counted:
            out, _ = function(layer, *inputs, mask)
        copies.append(
            sum(result.numel() for name, _, _, result in counted.calls if name == "clone" and result.ndim == 5)
        )
        found.append([out, *torch.autograd.grad((out * torch.linspace(-1, 1, 16)).sum(), inputs)])
    for expected, own in zip(*found, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-6)
    assert copies == [2 * inputs[0].numel(), 0]  # keys and values, each as large as the queries


@pytest.mark.parametrize("packed", [False, True])
def test_the_mask_in_blocks_is_the_dense_one(monkeypatch, packed):
    monkeypatch.setattr(module, "BLOCK", 4)
    batch = PairCollator(0, block_mask=True)(random_pairs(9))
    document, part = batch["document"], batch["part"]
    if packed:  # pairs one after another in one row
        own = document == 0
        number = torch.arange(len(own))[:, None].expand_as(own)
        document, part = number[own][None], part[own][None]
    else:
        dense = PairCollator(0)(random_pairs(9))["attention_mask"][:, 0]
        real = document == 0
    made = block_mask(document, part)
    rows, length = document.shape
    at = torch.arange(length)
    sees = made.mask_mod(torch.arange(rows)[:, None, None], 0, at[:, None], at)
    if not packed:
        assert torch.equal(sees[real], dense[real])
    missing = -length % 4
    padded = [torch.nn.functional.pad(sees, (0, missing, 0, missing), value=value) for value in (False, True)]
    some, whole = (each.unflatten(2, (-1, 4)).unflatten(1, (-1, 4)) for each in padded)
    some, whole = some.any(4).any(2), whole.all(4).all(2)
    full = torch.zeros_like(some)
    partial = torch.zeros_like(some)
    for kept, count, indices in (
        (full, made.full_kv_num_blocks, made.full_kv_indices),
        (partial, made.kv_num_blocks, made.kv_indices),
    ):
        for row, query in torch.cartesian_prod(torch.arange(rows), torch.arange(some.shape[1])).tolist():
            kept[row, query, indices[row, 0, query, : count[row, 0, query]].long()] = True
    assert not (full & partial).any() and not (full & ~whole).any()
    assert not (some & ~full & ~partial).any()
    # hardly a block more than the dense mask has, nor one that is taken element by element in vain
    assert (full | partial).sum() <= 1.05 * some.sum() and full.sum() >= 0.8 * whole.sum()
