"""For a GPU: `tune` chooses launch parameters, `benchmark` has functions that time kernels. torch and Triton alone."""
