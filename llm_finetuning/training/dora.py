"""What DoRA (arXiv 2402.09353) adds to the work of a training step, counted from PEFT's implementation."""

from dataclasses import dataclass

from llm_finetuning.hardware import Machine
from llm_finetuning.training.model_size import ModelSize


@dataclass(frozen=True)
class Work:
    """Operations and traffic beside those of LoRA."""

    flops: float
    """Float32 operations of a micro-batch, however many tokens it has."""
    bytes: float
    """Read and written for a micro-batch, however many tokens it has."""
    bytes_per_token: float
    """Read and written for each token beside that."""

    def seconds(self, machine: Machine, efficiency: float, batches: float, tokens: float) -> float:
        """The time of `tokens` in so many micro-batches; what a rate is not known for does not count.

        efficiency: share of the peak matmul throughput that is reached.
        """
        moved = batches * self.bytes + tokens * self.bytes_per_token
        parts = (batches * self.flops, machine.float32_flops * efficiency), (moved, machine.bandwidth)
        return sum(amount / rate for amount, rate in parts if rate)


def work(size: ModelSize, rank: int, byte: int, four_bit: bool, passes: int) -> Work:
    """The work that PEFT's DoraLinearLayer adds (peft/tuners/lora/dora.py).

    byte: of a number of the computation; passes: forward passes before a backward pass, 2 with activation
    checkpointing. In each it makes B·A out of a unit matrix, in float32: 2·r·in·(in + out) operations. The weight is
    dequantised once more; B·A is cast, scaled and added to it, and the length of each row of the sum is measured. None
    of this has a gradient (section 4.3). For each token the outputs of the base and of B·A are scaled by rows and added
    in float32, where LoRA accumulates B's product into the base's output (`fused_lora`).
    """
    adapted, cast = size.adapted, (4 + byte) * (byte != 4)
    a_weight = (0.5 + byte) * four_bit + 4 + cast + 6 * byte
    forward, backward = 5 * byte + 36 + cast, 5 * byte + 48 + 4 * cast
    return Work(
        flops=passes * 2 * rank * (adapted.squares + adapted.weights),
        bytes=passes * (a_weight * adapted.weights + 8 * adapted.squares),
        bytes_per_token=(passes * forward + backward) * adapted.outputs,
    )
