"""How a task is trained: epochs (`loop`), what an epoch goes over (`schedule`), how its steps run (`execution`), the
optimisers, evaluation after an epoch (`validation`), states to resume from (`checkpoint`), and a CUDA stream for each
run (`stream`)."""
