"""The notebook's training as a script, for several GPUs: one process a GPU, under torchrun or accelerate.

    torchrun --nproc_per_node 4 -m llm_finetuning.train DRIVE_FOLDER/settings.json
    accelerate launch --config_file profiles/accelerate/fsdp.yaml -m llm_finetuning.train DRIVE_FOLDER/settings.json

The settings file is the one that the finetuning notebook writes; tokens_per_step is shared among the processes, so
the run is the same one. Checkpoints and the adapter go where the notebook looks for them: run it afterwards, and it
finds the training finished and goes on with the merge.
"""

import argparse
import os

import torch

from llm_finetuning import settings
from llm_finetuning.training import rate_search, selfcheck
from llm_finetuning.training.dataset import read_inputs
from llm_finetuning.training.planning import plan_run
from llm_finetuning.training.qlora import add_adapters, load_base
from llm_finetuning.training.resumable import save_adapter, train
from llm_finetuning.training.trainer import AssistantTrainer


def main() -> None:
    """Trains to the end and saves the adapter, as the notebook does; only the first process prints and writes."""
    parser = argparse.ArgumentParser(prog="llm_finetuning.train", description=__doc__.split("\n\n")[0])
    parser.add_argument("settings", help="settings.json in the run's drive_folder")
    config = settings.from_file(settings.Finetuning, parser.parse_args().settings)
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    say = print if os.environ.get("RANK", "0") == "0" else lambda *_: None

    inputs = read_inputs(config)
    say(inputs.data.table().to_string(index=False))
    plan = plan_run(config, inputs)
    say(plan.table().to_string(index=False))
    model = add_adapters(load_base(config, plan), config)
    trainer = AssistantTrainer(model, config, plan, inputs)
    say(selfcheck.run(trainer).table.to_string(index=False))
    trainer, found = rate_search.find(trainer, AssistantTrainer)
    say(found or f"learning_rate = {trainer.settings.learning_rate}")
    outcome = train(trainer)
    save_adapter(trainer)
    say(outcome)
    trainer.accelerator.end_training()  # ends the process group's threads, which would abort a busy machine's exit


if __name__ == "__main__":
    main()
