"""Linear sites of a graph, one file an operator family."""

from onnxlr.sites.base import Bias, Family, Refusal, Site
from onnxlr.sites.families import FAMILIES, by_output
from onnxlr.sites.inventory import parameter_count, take_inventory
from onnxlr.sites.structure import Chain
from onnxlr.sites.weight import Inventory, Weight

__all__ = [
    "FAMILIES",
    "Bias",
    "Chain",
    "Family",
    "Inventory",
    "Refusal",
    "Site",
    "Weight",
    "by_output",
    "parameter_count",
    "take_inventory",
]
