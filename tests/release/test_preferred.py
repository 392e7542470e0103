"""The preferred model's folder: merged and published as the finetuned one, and read alike by other versions."""

from pathlib import Path

import old_transformers
import pytest
import read_folder
import torch
from inference_fixtures import ask, make_model, make_tokenizer
from preference_fixtures import beside, finetuned_folder, prepare_preference
from training_fixtures import save_base

from llm_finetuning.evaluation import preference
from llm_finetuning.files import checksums
from llm_finetuning.inference.chat import Chat
from llm_finetuning.inference.llama import LlamaEngine
from llm_finetuning.release import gguf, merging, publish, verify
from llm_finetuning.training.metrics import Metrics
from llm_finetuning.training.resumable import save_adapter, train

pytestmark = pytest.mark.more


@pytest.fixture(scope="module")
def preferred(tmp_path_factory) -> Path:
    """preferred_phi2, as the notebook's cells publish it, of a base that is shaped as Phi-2 is."""
    folder, tokenizer = tmp_path_factory.mktemp("run"), make_tokenizer()
    base = save_base(folder / "base", make_model(rows=(len(tokenizer) // 64 + 1) * 64, widening=4), tokenizer)
    finetuned = finetuned_folder(tmp_path_factory.mktemp("finetuned"), base)
    run = prepare_preference(beside(finetuned, folder, base, learning_rate=1e-2))
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


def test_as_a_gguf_file_it_computes_and_answers_alike(preferred, tmp_path, llama_cpp):
    exported = gguf.export(preferred, tmp_path / "gguf", ["f16"])
    assert exported.measured[0]["kl"] < 1e-4 and exported.measured[0]["top_1"] > 0.99
    chat = Chat.load(preferred, "float32")
    same = Chat(LlamaEngine(exported.folder / "model-f16.gguf", 256, 1), chat.template, chat.rules)
    for question in ("What is 1 and 2?", "Who is it?"):
        assert same.answer(ask(question)) == chat.answer(ask(question))
