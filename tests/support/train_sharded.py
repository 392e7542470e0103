"""llm_finetuning.train under FSDP on a CPU: accelerate launch --config_file … tests/train_sharded.py SETTINGS.

accelerate offers FSDP on accelerators alone, torch has it on a CPU too: here accelerate is told that it may. The
sharding, its collectives and its checkpoints are the real ones.
"""

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from full_disk import fill_if_asked

from llm_finetuning import train

begin = AcceleratorState.__init__


def begin_sharded(self, *positional, fsdp_plugin=None, **named) -> None:
    begin(self, *positional, fsdp_plugin=fsdp_plugin, **named)
    if fsdp_plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


AcceleratorState.__init__ = begin_sharded
torch.set_num_threads(1)
fill_if_asked()
train.main()
