"""Triton kernels run interpreted where there is no GPU; the variable counts when a kernel's module is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
