"""BatchNorm over a part of the batch that a GPU holds at once ("ghost batches": Hoffer et al., 2017, arXiv 1705.08741).

The paper's 32 images at a time leave a large GPU waiting for its host. More at a time, with BatchNorm's statistics over
32, follow the course of gradient accumulation over micro-batches of 32.
"""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from involution.engine.errors import UserError
from involution.ops.ghost import GhostBatchNorm2d


def use_ghost_batches(model: nn.Module, size: int) -> None:
    """Let the model's BatchNorm see `size` images at a time.

    Raises:
        UserError: the model has other kinds of BatchNorm.
    """
    for name, module in model.named_modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = GhostBatchNorm2d  # the same parameters and buffers, under the same names
            module.size = size  # type: ignore[assignment]
        elif isinstance(module, _BatchNorm):
            raise UserError(f"train.batchnorm_size knows torch's BatchNorm2d; {name} is a {type(module).__name__}")
