"""A notebook's training as a script, for several GPUs: one process a GPU, under torchrun or accelerate.

    torchrun --nproc_per_node 4 -m llm_finetuning.train DRIVE_FOLDER/settings.json
    accelerate launch --config_file profiles/accelerate/fsdp.yaml -m llm_finetuning.train DRIVE_FOLDER/settings.json

The settings file is the one that the finetuning notebook writes, or the preference tuning notebook
(preference_settings.json); tokens_per_step or pairs_per_step is shared among the processes, so the run is the same
one. Checkpoints and the adapter go where the notebook looks for them: run it afterwards, and it finds the training
finished and goes on with the merge.
"""

import argparse
import os
from pathlib import Path

import torch
from peft import PeftModel

from llm_finetuning import settings
from llm_finetuning.settings import Finetuning, PreferenceTuning
from llm_finetuning.training import dataset, preference_data, preference_start, rate_search, selfcheck
from llm_finetuning.training.planning import Plan, plan_run
from llm_finetuning.training.preference import PreferenceTrainer
from llm_finetuning.training.qlora import add_adapters, load_base
from llm_finetuning.training.resumable import save_adapter, train
from llm_finetuning.training.trainer import AssistantTrainer


def read_settings(path: Path) -> Finetuning:
    """The settings of the notebook that wrote the file. Raises what `settings.from_file` raises."""
    if not path.is_file() or '"pairs_per_step"' not in path.read_text(encoding="utf-8"):
        return settings.from_file(Finetuning, path)
    return preference_start.from_adapter(settings.from_file(PreferenceTuning, path))


def read_inputs(config: Finetuning) -> dataset.RunInputs:
    """The inputs of a finetuning or of preference tuning."""
    if not isinstance(config, PreferenceTuning):
        return dataset.read_inputs(config)
    inputs = preference_data.read_inputs(config)
    preference_start.check_template(config, inputs.template)
    return inputs


def load_model(config: Finetuning, plan: Plan) -> PeftModel:
    """The base with the adapters that are trained."""
    if isinstance(config, PreferenceTuning):
        return preference_start.load_base_with_adapter(config, plan)
    return add_adapters(load_base(config, plan), config)


def main() -> None:
    """Trains to the end and saves the adapter, as the notebook does; only the first process prints and writes."""
    parser = argparse.ArgumentParser(prog="llm_finetuning.train", description=__doc__.split("\n\n")[0])
    parser.add_argument("settings", type=Path, help="settings.json or preference_settings.json in drive_folder")
    config = read_settings(parser.parse_args().settings)
    build = PreferenceTrainer if isinstance(config, PreferenceTuning) else AssistantTrainer
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    say = print if os.environ.get("RANK", "0") == "0" else lambda *_: None

    inputs = read_inputs(config)
    say(inputs.data.table().to_string(index=False))
    plan = plan_run(config, inputs)
    say(plan.table().to_string(index=False))
    trainer = build(load_model(config, plan), config, plan, inputs)
    say(selfcheck.run(trainer).table.to_string(index=False))
    trainer, found = rate_search.find(trainer, build)
    say(found or f"learning_rate = {trainer.settings.learning_rate}")
    outcome = train(trainer)
    save_adapter(trainer)
    say(outcome)
    trainer.accelerator.end_training()  # ends the process group's threads, which would abort a busy machine's exit


if __name__ == "__main__":
    main()
