"""Tunes the small preference run in a process of its own: python prefer_small.py FOLDER BASE ADAPTER EPOCHS."""

import sys

import torch
from preference_fixtures import preference_settings, prepare_preference

from llm_finetuning.training.resumable import save_adapter, train

torch.set_num_threads(1)
folder, base, adapter, epochs = sys.argv[1:]
run = prepare_preference(
    preference_settings(folder, base, adapter_folder=adapter, num_train_epochs=float(epochs), save_steps=2)
)
print("READY", flush=True)
print(train(run.trainer))
save_adapter(run.trainer)
