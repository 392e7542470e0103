"""llm_finetuning.train where a process cannot write at one step: torchrun train_faulty.py SETTINGS RANK STEP ERRNO."""

import os
import sys

import torch
from full_disk import fill_if_asked
from transformers import Trainer

from llm_finetuning import train

fill_if_asked()
rank, step, number = map(int, sys.argv[2:])
del sys.argv[2:]
whole = Trainer._save_rng_state


def failing(self, output_dir: str) -> None:
    """The last part of a checkpoint that each process writes."""
    if int(os.environ["RANK"]) == rank and self.state.global_step == step:
        raise OSError(number, os.strerror(number))
    whole(self, output_dir)


Trainer._save_rng_state = failing
torch.set_num_threads(1)
train.main()
