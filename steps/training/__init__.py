"""How a sequence model is trained: epochs (`loop`), their steps (`steps`), evaluation after an epoch (`validation`),
states to resume from (`states`), and a CUDA stream for each run (`stream`)."""
