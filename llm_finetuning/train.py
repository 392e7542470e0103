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
from transformers import AutoConfig

from llm_finetuning import hardware, models, prompts, settings
from llm_finetuning.data import pairs
from llm_finetuning.evaluation import scoreboard
from llm_finetuning.training import qlora
from llm_finetuning.training import trainer as training
from llm_finetuning.training.dataset import encode_pairs


def main() -> None:
    """Trains to the end and saves the adapter; only the first process writes."""
    parser = argparse.ArgumentParser(prog="llm_finetuning.train", description=__doc__.split("\n\n")[0])
    parser.add_argument("settings", help="settings.json in the run's drive_folder")
    chosen = settings.from_file(settings.Finetuning, parser.parse_args().settings)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    model_path = models.locate(chosen.model_name, chosen.folders.base, chosen.tokenizer_folder, chosen.model_revision)
    tokenizer = models.tokenizer(chosen.model_name, chosen.tokenizer_folder, chosen.model_revision)
    template = prompts.template_for(tokenizer, chosen.system_message)
    train_pairs, val_pairs = (
        pairs.to_records(pairs.read_jsonl(file)) for file in (chosen.folders.train_file, chosen.folders.val_file)
    )
    data = encode_pairs(train_pairs, template, chosen.max_seq_length)
    config = AutoConfig.from_pretrained(model_path)
    plan = training.plan_run(chosen, hardware.detect(chosen.dtype), config, data.lengths)
    held_out = scoreboard.held_out_set(val_pairs, template, chosen.max_seq_length, chosen.eval_pairs, chosen.seed)
    model = qlora.add_adapters(qlora.load_base(chosen, plan, model_path), chosen)
    trainer, _ = training.build(model, template, data, chosen, plan, held_out)
    if trainer.is_world_process_zero():
        print(plan.table().to_string(index=False))
    said = training.train(trainer, chosen)
    training.save_adapter(trainer, template, chosen)
    if trainer.is_world_process_zero():
        print(said)


if __name__ == "__main__":
    main()
