"""Tunes the small preference run in a process of its own: python prefer_small.py FOLDER BASE ADAPTER EPOCHS [RATE].

RATE: a learning rate, or "find" to search for it.
"""

import sys

import torch
from preference_fixtures import preference_settings, prepare_preference

from llm_finetuning.training import rate_search
from llm_finetuning.training.preference import PreferenceTrainer
from llm_finetuning.training.resumable import save_adapter, train

torch.set_num_threads(1)
folder, base, adapter, epochs, *rate = sys.argv[1:]
changed = {"find_learning_rate": True} if rate == ["find"] else {"learning_rate": float(rate[0])} if rate else {}
run = prepare_preference(
    preference_settings(folder, base, adapter_folder=adapter, num_train_epochs=float(epochs), save_steps=2, **changed)
)
print("READY", flush=True)
trainer, search = rate_search.find(run.trainer, PreferenceTrainer)
print(search or "no search", flush=True)
print(train(trainer))
save_adapter(trainer)
