"""Recipes under FSDP2 and DeepSpeed on two processes against one: the same losses, log-probabilities and weights."""

import json
import math

import pytest
from accelerate.utils import is_deepspeed_available

from tests.sharded_job import CASES, MATRIX, WRAPPERS, Runs, differences


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    found = Runs(tmp_path_factory.mktemp("sharded"))
    yield found
    found.close()


@pytest.mark.parametrize(("wrapper", "name"), MATRIX)
def test_two_sharded_processes_follow_one(runs, wrapper, name):
    if "ZeRO" in wrapper and not is_deepspeed_available():
        pytest.skip("DeepSpeed is not installed: make test-deepspeed")
    case, kind = CASES[name], WRAPPERS[wrapper][2]
    one, two = runs.one(name), runs.two(wrapper, name)
    ran = json.loads((two / "run.json").read_text())
    assert (ran["num_processes"], ran["parallelism"], ran["complete"]) == (2, kind, True)
    found = differences(one, two)
    # in bfloat16, weights and products are rounded in other places; measured: 4e-3 (LoRA at 1e-2), 3e-4, 2e-4
    assert found["loss"] < (8e-3 if case.bfloat16 else 1e-5)
    assert found.get("log-probability, mean of a batch", 0) < (1e-3 if case.bfloat16 else 1e-5)
    assert found.get("log-probability, response", 0) < (1e-3 if case.bfloat16 else 1e-5)
    if case.stage == "dpo":
        exact = differences(runs.one(name, bfloat16=False), two)
        assert exact.get("log-probability, response", 0) < 1e-3
        steps = [json.loads(line) for line in (two / "metrics.jsonl").read_text().splitlines()]
        first = next(step for step in steps if (step["stage"], step["split"]) == ("dpo", "train"))
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)  # the policy is the reference, in training too

    summaries = [json.loads((each / "summary.json").read_text()).get(case.stage, {}) for each in (one, two)]
    assert summaries[0].get("kept_step") == summaries[1].get("kept_step")
    if "metric_for_best_model" in " ".join(case.flags):
        assert summaries[1]["kept_epoch"] < 2  # of two: the best was not the last
