"""A layer computes what the reference does with what is left without Triton; and which backend do tensors on GPUs get?
(test_triton.py runs this file in processes of their own; its argument is code that takes something away.)"""

import contextlib
import ctypes
import os
import sys

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from involution import Involution2d
from involution.engine.run import log_to
from involution.ops import backends

os.environ.pop("CC", None)
torch.cuda.get_device_capability = lambda device=None: (9, 0)
torch.cuda.current_device = lambda: 0
torch.cuda.device = lambda device: contextlib.nullcontext()
exec(sys.argv[1])
log_to(None, is_main=os.environ["LOCAL_RANK"] == "0")

backends._PREFERRED["cpu"] = "triton"
x, layer = torch.randn(2, 32, 9, 7, dtype=torch.float64, requires_grad=True), Involution2d(32).double()
found = []
for forced in ("", "reference"):
    os.environ["INVOLUTION_BACKEND"] = forced
    out = layer(x)
    found.append([out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])])
torch.testing.assert_close(*found)

os.environ["INVOLUTION_BACKEND"] = ""
ctypes.CDLL(os.environ["TRITON_LIBCUDA_PATH"] + "/libcuda.so.1")  # as torch loads it where there is a GPU
torch.cuda.is_available = lambda: True
with FakeTensorMode():
    tensors = [torch.empty(1, device=f"cuda:{i}", dtype=t) for i in (0, 1) for t in (torch.float32, torch.bfloat16)]
(chosen,) = {backends.choose(tensor, tensor).__name__ for tensor in 2 * tensors}
print(chosen.rpartition(".")[2])
