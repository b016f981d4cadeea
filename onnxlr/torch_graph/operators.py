"""All operators: importing this registers every family.

A family is one file; a new one is added here.
"""

from onnxlr.torch_graph import (
    activation,
    attention,
    contrib,
    control,
    conv,
    create,
    elementwise,
    index,
    linear,
    loss,
    norm,
    pool,
    quantize,
    recurrent,
    reduce,
    resize,
    sample,
    sequence,
    shape,
    signal,
)

__all__ = [
    "activation",
    "attention",
    "contrib",
    "control",
    "conv",
    "create",
    "elementwise",
    "index",
    "linear",
    "loss",
    "norm",
    "pool",
    "quantize",
    "recurrent",
    "reduce",
    "resize",
    "sample",
    "sequence",
    "shape",
    "signal",
]
