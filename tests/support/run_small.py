"""The cells of the finetuning notebook for a small run, in a process of its own: python run_small.py FOLDER BASE.

Prints a line with the name of each stage when it begins.
"""

import sys
from pathlib import Path

import torch
from training_fixtures import prepare, small_pairs, small_settings, write_lines

from llm_finetuning import hardware
from llm_finetuning.evaluation import scoreboard
from llm_finetuning.release import held_weights, merging, verify
from llm_finetuning.release.publish import publish
from llm_finetuning.training import metrics
from llm_finetuning.training.resumable import save_adapter, train

STAGES = ("training", "saving", "after", "merge", "publishing", "reading back")


def stage(name: str) -> None:
    print(f"STAGE {name}", flush=True)


def main(folder: Path, base: str) -> None:
    torch.set_num_threads(1)
    settings = small_settings(folder, base, num_train_epochs=1.0)
    folders = settings.folders
    for file in (folders.train_file, folders.val_file):
        write_lines(file, small_pairs())
    small = prepare(settings)
    stage("training")
    print(train(small.trainer))
    stage("saving")
    save_adapter(small.trainer)
    stage("after")
    board = {"before": {"loss": 9.0, "samples": []}}
    board |= scoreboard.after(small.trainer.model, small.held_out, small.template, settings)
    stage("merge")
    plan, held_out, template = small.plan, small.held_out, small.template
    held_weights.save(small.trainer.model, plan)
    quantised = merging.quantised_names(small.trainer.model)
    del small.trainer
    hardware.free_memory()
    merged = verify.merge_and_verify(plan, quantised, template, held_out, board["after"]["loss"])
    stage("publishing")
    published = publish(merged, plan, board, metrics.Metrics(folders.metrics).read())
    stage("reading back")
    scoreboard.published(published, held_out, template, settings, plan.save_dtype, plan.device)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
