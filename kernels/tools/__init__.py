"""Scripts for a GPU: choose launch parameters (`tune`), time the kernels (`benchmark`). torch and Triton alone."""
