"""How a sequence model is trained: epochs (`loop`), their steps (`steps`), and states to go on from (`states`)."""
