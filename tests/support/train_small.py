"""Trains the small run in a process of its own: python train_small.py FOLDER BASE. Prints READY before it trains."""

import sys

import torch
from training_fixtures import prepare, small_settings

from llm_finetuning.training.resumable import save_adapter, train

torch.set_num_threads(1)
folder, base, *rest = sys.argv[1:]
run = prepare(small_settings(folder, base, num_train_epochs=float(rest[0]) if rest else 3.0))
print("READY", flush=True)
print(train(run.trainer))
save_adapter(run.trainer)
