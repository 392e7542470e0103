"""Names of other libraries are checked before anything is fetched or loaded."""

import pytest
from training_fixtures import small_settings

from llm_finetuning import models
from llm_finetuning.training import planning
from llm_finetuning.training.preconditions import check_names


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type = 'cosin': did you mean 'cosine'"),
        ({"lr_scheduler_type": "zigzag"}, "lr_scheduler_type = 'zigzag': one of linear, cosine"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "'warmup_stable_decay' cannot be used here .*num_decay_steps"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "'cosine_with_min_lr' cannot be used here .*min_lr"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "needs a metric at each step"),
        ({"optim": "adamw_tourch"}, "optim = 'adamw_tourch': did you mean 'adamw_torch'"),
        ({"optim": "galore_adamw"}, "optim = 'galore_adamw' cannot be used here .*galore_torch.*set optim = 'auto'"),
        ({"report_to": "wandbb"}, "report_to = 'wandbb': did you mean 'wandb'"),
        ({"report_to": "neptune"}, "report_to = 'neptune': neptune is not installed"),
    ],
)
def test_what_other_libraries_do_not_know_is_named_with_its_cure(changed, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        check_names(small_settings(tmp_path, "sample", **changed))


def test_what_they_know_passes(tmp_path):
    for changed in ({}, {"lr_scheduler_type": "polynomial"}, {"optim": "adafactor"}, {"report_to": "tensorboard"}):
        check_names(small_settings(tmp_path, "sample", **changed))


def test_all_are_said_at_once_and_before_the_base_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "locate", lambda *_: pytest.fail("the base was fetched"))
    chosen = small_settings(tmp_path, "sample", lr_scheduler_type="x", optim="y", report_to="z")
    with pytest.raises(ValueError, match="(?s)lr_scheduler_type = 'x'.*optim = 'y'.*report_to = 'z'"):
        planning.plan_run(chosen, [10])
