"""Linear sites of a graph, one file an operator family."""

from onnxlr.sites.base import Bias, Family, Pair, Refusal, Site
from onnxlr.sites.inventory import FAMILIES, Inventory, Weight, parameter_count, take_inventory

__all__ = [
    "FAMILIES",
    "Bias",
    "Family",
    "Inventory",
    "Pair",
    "Refusal",
    "Site",
    "Weight",
    "parameter_count",
    "take_inventory",
]
