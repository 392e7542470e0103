"""The merge of a small run whose trained model is gone, in a process of its own: merge_small.py FOLDER BASE WHEN.

It dies by SIGKILL before the tensor number WHEN is rounded, counted over both bases.
"""

import dataclasses
import itertools
import json
import os
import signal
import sys
from pathlib import Path

import torch
from training_fixtures import small_pairs, small_settings

from llm_finetuning import models
from llm_finetuning.release import merging, verify
from llm_finetuning.training.dataset import encode_inputs
from llm_finetuning.training.planning import plan_run


def main(folder: Path, base: str, when: int) -> None:
    torch.set_num_threads(1)
    settings = small_settings(folder, base)
    inputs = encode_inputs(settings, models.tokenizer(base), small_pairs(), small_pairs())
    plan = dataclasses.replace(plan_run(settings, inputs), settings=settings)
    numbers, merge_tensor = itertools.count(1), merging.merge_tensor

    def dying(*values: torch.Tensor) -> torch.Tensor:
        if next(numbers) == when:
            os.kill(os.getpid(), signal.SIGKILL)
        return merge_tensor(*values)

    merging.merge_tensor = dying
    noted = json.loads((folder / "noted.json").read_text())
    verify.merge_and_verify(plan, set(noted["quantised"]), inputs.template, inputs.held_out, noted["loss"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
