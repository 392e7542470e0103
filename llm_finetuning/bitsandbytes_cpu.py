"""bitsandbytes' 4 bits on a CPU, mended: its kernel takes the wrong scales where a row holds no whole blocks.

A block is 64 weights in a row of the flattened matrix; the CPU kernel begins one anew with each row. Of rows of 160, as
in the sample, a third of the weights come back with a neighbour's scale: an error of 26% of the weights' norm in place
of NF4's 9%, and no word about it. GPUs are not concerned, nor matrices whose rows are a multiple of 64.
"""

import functools
import math
import warnings

import torch

OPERATOR = "bitsandbytes::dequantize_4bit"


@functools.cache
def mend() -> None:
    """Makes the CPU kernel read a matrix as one row, in this process and once; before torch 2.9 it stays as it is."""
    import bitsandbytes  # noqa: F401  registers the kernel

    if not hasattr(torch.library, "get_kernel"):
        return
    kernel = torch.library.get_kernel(OPERATOR, "CPU")

    def dequantize(
        keys: torch.DispatchKeySet,
        packed: torch.Tensor,
        scales: torch.Tensor,
        block: int,
        quant_type: str,
        shape: list[int],
        dtype: torch.dtype,
    ) -> torch.Tensor:
        flat = shape if shape[-1] % block == 0 else [1, math.prod(shape)]
        return kernel.call_boxed(keys, packed, scales, block, quant_type, flat, dtype).view(*shape)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is replaced is what is meant
        LIBRARY.impl(OPERATOR, dequantize, "CPU", with_keyset=True)


LIBRARY = torch.library.Library("bitsandbytes", "FRAGMENT")
"""Holds the replaced kernel as long as the process lives."""
