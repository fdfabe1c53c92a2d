"""The README.md beside exported weights, as the Hugging Face Hub shows it."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from involution.complexity import count


def model_card(
    model: nn.Module,
    name: str,
    options: dict[str, Any],
    class_names: Sequence[str],
    note: str,
    preparation: Mapping[str, Any],
) -> str:
    """What the model is, costs and takes, and how it is loaded; arguments as of ``export.save_safetensors``, and
    ``options`` of ``create_model``."""
    side, resize, mean, std = preparation.values()
    tags = "timm" if "library" in options else "involution, rednet"
    licence = "" if "library" in options else "\nlicense: mit"
    measured = count(model, (options.get("in_chans", 3), side, side))
    arguments = "".join(f", {key}={value!r}" for key, value in options.items())
    classes = "".join(f"{i}. {class_name}\n" for i, class_name in enumerate(class_names))
    listing = f"\nClasses, counted from 0:\n\n{classes}" if class_names else ""
    return f"""---{licence}
library_name: involution
pipeline_tag: image-classification
tags: [image-classification, {tags}]
---
# {name}

{note or "No training data, recipe or accuracy was given for these weights."}

- Parameters {measured.params / 1e6:.3f} M, FLOPs {measured.flops / 1e9:.2f} G at {side} pixels, counted as in the paper
- Images: RGB, short side to {resize}, centre crop {side}, scaled to 0..1, normalised with mean {tuple(mean)} and
  deviation {tuple(std)}
- Made with: Involution: Inverting the Inherence of Convolution for Visual Recognition, https://arxiv.org/abs/2103.06255

```python
import involution
model = involution.create_model({name!r}{arguments}, pretrained="model.safetensors").eval()
model, transform, class_names = involution.load("model.safetensors")  # the same, ready to use
```
{listing}"""
