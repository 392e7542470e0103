"""A disk that is full from the first training step on, for scripts that train: their last argument is `fill`."""

import os
import shutil
import sys
from pathlib import Path

from transformers import Trainer

LEFT = 8192


def fill_if_asked() -> None:
    """Takes `fill` off the arguments, and has the first process fill the disk of its checkpoints before it trains."""
    if sys.argv[-1] != "fill":
        return
    sys.argv.pop()
    train = Trainer.train

    def on_a_full_disk(self, *positional, **named):
        folder = Path(self.args.output_dir)
        if os.environ["RANK"] == "0":
            (folder / "filling").write_bytes(bytes(shutil.disk_usage(folder).free - LEFT))
        return train(self, *positional, **named)

    Trainer.train = on_a_full_disk
