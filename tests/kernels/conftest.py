"""Triton kernels run interpreted where there is no GPU; the variable counts when a kernel's module is imported."""

import contextlib
import os

import torch
from interpreted import patch_once_a_launch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    with contextlib.suppress(ImportError):
        patch_once_a_launch()
