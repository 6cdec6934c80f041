"""FSDP2 without a GPU: torch's own `fully_shard` on two gloo processes, against the whole model on each.

accelerate refuses to shard on the CPU, so the model is sharded here as accelerate 1.15 does it: every block, then the
embeddings with the last norm and the LM head, then the rest.

torchrun --nproc_per_node 2 tests/sharded_job.py
"""

import copy
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script: `tests` is found from the root

from resdpo_trl.processes import parallelism
from resdpo_trl.text import scoring
from resdpo_trl.text.batch import PairCollator
from tests.conftest import random_pairs, tiny_model


def shard(model, mesh):
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    tail = [model.transformer.ln_f, model.transformer.wte, model.lm_head]
    fully_shard(tail, mesh=mesh, reshard_after_forward=False)
    return fully_shard(model, mesh=mesh)


def loss_of(model, batch):
    chosen, rejected = scoring.pair_logps(model, batch)
    return -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()


def compare() -> str:
    """Raise where the sharded model differs from the whole one; what sharded it."""
    rank = torch.distributed.get_rank()
    whole = tiny_model("gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    scoring.add_response_head(whole)
    sharded = tiny_model("gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    scoring.add_response_head(sharded)
    shard(sharded, init_device_mesh("cpu", (2,)))
    assert all(isinstance(parameter, DTensor) for parameter in sharded.parameters())
    rows = random_pairs(8)
    scoring.CHUNK_TOKENS = 16  # the LM head in pieces, run again in the backward pass
    for sharing in (True, False):
        collate = PairCollator(0, sharing)
        loss_of(whole, collate(rows)).backward()
        local = loss_of(sharded, collate(rows[4 * rank : 4 * rank + 4]))
        local.backward()
        total = local.detach().clone()
        torch.distributed.all_reduce(total)
        torch.testing.assert_close(total / 2, loss_of(whole, collate(rows)).detach())
        for (name, parameter), own in zip(whole.named_parameters(), sharded.parameters(), strict=True):
            torch.testing.assert_close(own.grad.full_tensor(), parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
        whole.zero_grad()
        sharded.zero_grad()
    state = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        expected = copy.deepcopy(whole.state_dict())
        assert set(expected) == set(state)
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value)
    return str(parallelism(sharded)["parallelism"])


if __name__ == "__main__":
    PartialState(cpu=True)
    print(compare(), "as whole")
    torch.distributed.destroy_process_group()
