"""torch.hub entry points: ``torch.hub.load("OWNER/REPOSITORY", "rednet50", num_classes=10)``.

Options are those of ``involution.create_model``, with ``pretrained=True`` or ``pretrained=PATH_OR_URL``.
"""

from functools import partial

from involution.models import MODELS, create_model

dependencies = ["torch"]

for _name in MODELS:
    globals()[_name] = partial(create_model, _name)
    globals()[_name].__doc__ = create_model.__doc__
