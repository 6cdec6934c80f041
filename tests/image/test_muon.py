import pytest
import torch

from resdpo_trl.image.muon import MOMENTUM, STEPS, orthogonalize, with_muon


@pytest.mark.parametrize("shape", [(8, 30), (30, 8), (16, 16)])
def test_singular_values_end_near_one(shape):
    """With U and V of the decomposition as they were: Newton–Schulz in enough steps."""
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    found = u.T @ orthogonalize(matrix, steps=5).float() @ vt.T
    assert ((found.diagonal() > 0.6) & (found.diagonal() < 1.3)).all()
    torch.testing.assert_close(found - found.diagonal().diag(), torch.zeros_like(found), atol=0.05, rtol=0)


def test_zero_stays_zero():
    assert orthogonalize(torch.zeros(4, 9)).count_nonzero() == 0


def test_torchs_muon_takes_the_same_step_on_a_matrix():
    """torch.optim.Muon's update, from the gradient of its own momentum, on the normalized weight."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(6, 5, 3, 3).contiguous(memory_format=torch.channels_last))
    bias = torch.nn.Parameter(torch.randn(6))
    matrix = torch.nn.Parameter(weight.detach().permute(0, 2, 3, 1).reshape(6, -1).clone())
    ours = with_muon(torch.optim.SGD)([{"params": [bias]}, {"params": [weight], "muon": True, "lr": 0.1}], lr=0.5)
    theirs = torch.optim.Muon([matrix], lr=0.1, weight_decay=0.0, momentum=MOMENTUM, nesterov=True, ns_steps=STEPS)
    before = bias.detach().clone()
    momentum = torch.zeros_like(matrix)
    for _ in range(3):
        weight.grad, bias.grad = torch.randn_like(weight), torch.ones_like(bias)
        ours.step()
        gradient = weight.grad.permute(0, 2, 3, 1).reshape(6, -1)
        # torch's momentum is a running mean, B ← μB + (1−μ)G; ours a running sum: the direction of G + μB differs
        momentum = MOMENTUM * momentum + gradient
        nesterov = gradient + MOMENTUM * momentum
        with torch.no_grad():
            matrix.mul_(6**0.5 / matrix.norm())
        theirs.state.clear()
        matrix.grad = nesterov  # whose own momentum starts at zero: a multiple of the gradient
        theirs.step()
        found = weight.detach().permute(0, 2, 3, 1).reshape(6, -1)
        torch.testing.assert_close(found, matrix.detach(), atol=2e-3, rtol=0)
    torch.testing.assert_close(bias.detach(), before - 3 * 0.5)
