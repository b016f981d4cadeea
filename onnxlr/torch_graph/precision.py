"""In which precision torch multiplies float32 on a GPU.

Left to itself it rounds the operands of convolutions to TF32, 10 bits of mantissa, and those of products where the user
has asked for it. Parity, gradients and errors would be measured through that noise. A step of training bears it: the
noise of bfloat16, four times larger, it does not bear where the two models are close already (the fashion ViT at a
quarter of its parameters learned nothing in bfloat16, and in TF32 lost a ninth of its error, as it does in float32).
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

_OPERATORS = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
_ROUNDED, _WHOLE = "tf32", "ieee"


@contextmanager
def float32_products(*, tf32: bool = False) -> Iterator[None]:
    """Multiply float32 in float32 until it ends, or in TF32. Serves as a decorator too."""
    before = [operator.fp32_precision for operator in _OPERATORS]
    try:
        for operator in _OPERATORS:
            operator.fp32_precision = _ROUNDED if tf32 else _WHOLE
        yield
    finally:
        for operator, precision in zip(_OPERATORS, before, strict=True):
            operator.fp32_precision = precision
