"""Trains the small run in a process of its own: python train_small.py FOLDER BASE [EPOCHS].

Prints READY before it trains.
"""

import sys

import torch
from training_fixtures import prepare, small_settings

from llm_finetuning.training.resumable import save_adapter, train


def main(folder: str, base: str, epochs: str = "3") -> None:
    torch.set_num_threads(1)
    run = prepare(small_settings(folder, base, num_train_epochs=float(epochs)))
    print("READY", flush=True)
    print(train(run.trainer))
    save_adapter(run.trainer)


if __name__ == "__main__":
    main(*sys.argv[1:])
