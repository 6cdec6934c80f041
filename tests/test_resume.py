"""A trainer that is used without a recipe, as docs/extending.md has it."""

import torch

from tests.image.test_trainer import trainer


def test_true_goes_on_from_the_newest_whole_checkpoint(tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    whole = trainer(tmp_path, **options)
    whole.train()
    (tmp_path / "checkpoint-6" / "optimizer.pt").unlink()
    resumed = trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed._resumed_from == str(tmp_path / "checkpoint-4")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
