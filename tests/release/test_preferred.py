"""The preferred model's folder: merged and published as the finetuned one, and read alike by other versions."""

from pathlib import Path

import old_transformers
import pytest
import read_folder
import torch
from preference_fixtures import beside, prepare_preference

from llm_finetuning.evaluation import preference
from llm_finetuning.files import checksums
from llm_finetuning.inference.chat import Chat
from llm_finetuning.release import merging, publish, verify
from llm_finetuning.training.metrics import Metrics
from llm_finetuning.training.resumable import save_adapter, train

pytestmark = pytest.mark.more


@pytest.fixture(scope="module")
def preferred(finetuned, tiny_base, tmp_path_factory) -> Path:
    """preferred_phi2, as the notebook's cells publish it."""
    run = prepare_preference(beside(finetuned, tmp_path_factory.mktemp("run"), tiny_base, learning_rate=1e-2))
    plan, template, held_out = run.plan, run.template, run.held_out
    measured_on = held_out, template, run.settings, run.trainer.run_inputs.ranked
    preference.column("before", run.model, *measured_on)
    train(run.trainer)
    save_adapter(run.trainer)
    board = preference.column("after", run.model, *measured_on, run.trainer.divergence())
    quantised, loss = merging.quantised_names(run.model), board["after"]["loss"]
    merged = verify.merge_and_verify(plan, quantised, template, held_out, loss)
    entries = Metrics(run.settings.folders.metrics).read()
    publish.publish(merged, plan, board, entries, None)
    return run.settings.folders.published


def test_the_folder_is_whole_and_answers(preferred):
    assert preferred.name == "preferred_phi2" and checksums.verify_checksums(preferred)
    assert isinstance(Chat.load(preferred).answer([{"role": "user", "content": "What is 1 and 2?"}]), str)


@pytest.mark.parametrize("version", sorted(old_transformers.NEEDED))
def test_other_versions_give_the_same_answers(version, preferred):
    here, there = read_folder.read(str(preferred)), old_transformers.read_with(version, [preferred])[preferred.name]
    assert there["answers"] == here["answers"]
    ours, theirs = torch.tensor(here["logits"]), torch.tensor(there["logits"])
    assert (theirs - ours).norm() <= 1e-5 * ours.norm() and there["dtype"] == here["dtype"]
