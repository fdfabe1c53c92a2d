"""Weights in and out: any file, address or name -> tensors under our names, and the model they are of.

- ``source``: where a file is: a path, a run's folder, an address, or the name of published weights (``published``)
- ``files``: any kind of file -> its contents, without executing anything in it
- ``run_file``: the checkpoints that train.py writes, atomic and hashed
- ``names``: other programs' names of tensors <-> ours, a module for each family of models (``rednet``)
- ``opened``: all of these together; ``into``: tensors into a model
"""

from involution.weights.files import read, why_unreadable
from involution.weights.into import classifier_of, load_into, mismatch
from involution.weights.names import describe, other_options, to_ours, to_released
from involution.weights.opened import Weights, open_weights
from involution.weights.source import fetch

__all__ = [
    "Weights",
    "classifier_of",
    "describe",
    "fetch",
    "load_into",
    "mismatch",
    "open_weights",
    "other_options",
    "read",
    "to_ours",
    "to_released",
    "why_unreadable",
]
