import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, Gemma2Config
from transformers.models.gemma2.modeling_gemma2 import Gemma2MLP, Gemma2RMSNorm

from resdpo_trl.text.fused import RMSNorm, SwiGLU, _RMSNorm, _SiLUProduct, use_fused_layers
from tests.conftest import tiny_model

FAMILIES = ["llama", "qwen3", "mistral"]


def norm_and_mlp(kind, dtype=torch.float32):
    layer = tiny_model(kind).to(dtype).model.layers[0]
    return {"norm": layer.post_attention_layernorm, "mlp": layer.mlp}


def fused(module):
    holder = torch.nn.ModuleList([copy.deepcopy(module)])
    use_fused_layers(holder)
    assert type(holder[0]) in (RMSNorm, SwiGLU)
    return holder[0]


def results(module, values, run=None):
    """The output and the gradients of the input and of every trained parameter."""
    values = values.clone().requires_grad_()
    out = run(module, values) if run else module(values)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    weights = torch.linspace(-1, 1, out.shape[-1], dtype=torch.float64)
    return [out, *torch.autograd.grad((out.double() * weights).sum(), [values, *trained])]


def compare(module, values, rtol, atol, run=None):
    expected, found = results(module, values, run), results(fused(module), values, run)
    for right, own in zip(expected, found, strict=True):
        torch.testing.assert_close(own.double(), right.double(), rtol=rtol, atol=atol)


def under_autocast(module, values):
    with torch.autocast("cpu", torch.bfloat16):
        return module(values)


def under_checkpointing(module, values):
    return checkpoint(module, values, use_reentrant=False)


def test_the_gradients_are_the_numerical_ones():
    torch.manual_seed(0)
    values, weight = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    inputs = (values.requires_grad_(), weight.requires_grad_())
    torch.autograd.gradcheck(lambda x, w: _RMSNorm.apply(x, w, 1e-5, torch.float64), inputs)
    gate, up = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.autograd.gradcheck(_SiLUProduct.apply, (gate, up))


@pytest.mark.parametrize("part", ["norm", "mlp"])
@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("run", [None, under_checkpointing], ids=["plain", "checkpointing"])
def test_it_is_transformers_module_in_float32(kind, part, run):
    torch.manual_seed(0)
    compare(norm_and_mlp(kind)[part], 3 * torch.randn(2, 7, 32), rtol=1e-5, atol=1e-5, run=run)


@pytest.mark.parametrize("part", ["norm", "mlp"])
@pytest.mark.parametrize("run", [None, under_autocast], ids=["bfloat16 weights", "autocast"])
def test_it_is_transformers_module_to_bfloat16(part, run):
    """As near to float32's numbers as transformers' own module is, within a factor of two."""
    torch.manual_seed(0)
    module = norm_and_mlp("llama")[part]
    values = 3 * torch.randn(4, 50, 32)
    exact = results(module, values)
    if run is None:
        module, values = module.bfloat16(), values.bfloat16()
    for right, theirs, ours in zip(
        exact, results(module, values, run), results(fused(module), values, run), strict=True
    ):
        error = (ours.double() - right.double()).norm() / right.double().norm()
        assert error < max(2 * (theirs.double() - right.double()).norm() / right.double().norm(), 5e-3) < 0.05


def test_autocast_gives_the_type_that_linear_layers_take():
    norm = fused(norm_and_mlp("llama")["norm"])
    assert under_autocast(norm, torch.randn(2, 32)).dtype == torch.bfloat16
    assert norm(torch.randn(2, 32)).dtype == torch.float32
    assert norm(torch.randn(2, 32).bfloat16()).dtype == torch.float32  # as transformers' with a float32 weight


@pytest.mark.parametrize("part", ["norm", "mlp"])
def test_a_frozen_weight_and_an_input_without_gradient(part):
    module = norm_and_mlp("llama")[part]
    module.requires_grad_(False)
    compare(module, torch.randn(3, 32), rtol=1e-5, atol=1e-5)
    module.requires_grad_(True)
    own = fused(module)
    for each in (module, own):
        each(torch.linspace(-1, 1, 64).view(2, 32)).square().sum().backward()
    for expected, found in zip(module.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_whole_model_scores_and_learns_the_same(kind, tmp_path):
    plain = tiny_model(kind)
    own = copy.deepcopy(plain)
    use_fused_layers(own)
    kinds = [type(module) for module in own.modules()]
    assert kinds.count(SwiGLU) == 2 and kinds.count(RMSNorm) == (9 if kind == "qwen3" else 5)
    ids = torch.arange(1, 61).view(2, 30)
    for model in (plain, own):
        model(ids, labels=ids).loss.backward()
    for (name, expected), (_, found) in zip(plain.named_parameters(), own.named_parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-6, msg=name)
    own.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not any(isinstance(module, RMSNorm | SwiGLU) for module in loaded.modules())
    torch.testing.assert_close(loaded(ids).logits, plain(ids).logits)


def test_lora_learns_through_it_as_through_transformers():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj", "gate_proj", "down_proj"], init_lora_weights=False)
    plain = tiny_model("llama")
    own = copy.deepcopy(plain)
    use_fused_layers(own)
    ids = torch.arange(1, 31).view(1, 30)
    gradients = []
    for model in (plain, own):
        torch.manual_seed(1)
        adapted = get_peft_model(model, config)
        adapted(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: each.grad for name, each in adapted.named_parameters() if each.grad is not None})
    assert {name.split(".")[-4] for name in gradients[0]} == {"q_proj", "gate_proj", "down_proj"}
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-6, msg=name)


def test_other_norms_and_mlps_are_left_alone():
    config = Gemma2Config(hidden_size=8, intermediate_size=12)
    norm = Gemma2RMSNorm(8)
    norm.variance_epsilon = norm.eps  # even under the name that Llama's has
    model = torch.nn.ModuleList([norm, Gemma2MLP(config)])
    use_fused_layers(model)
    assert [type(module) for module in model] == [Gemma2RMSNorm, Gemma2MLP]
