"""The metrics' names, apart from how they are computed: reports need no torch."""

HR_CUTOFFS = (1, 10, 50, 100, 200)
NDCG_CUTOFFS = (10, 50, 200)
NAMES = (*(f"hr@{k}" for k in HR_CUTOFFS), *(f"ndcg@{k}" for k in NDCG_CUTOFFS), "mrr")
#: What validation selects an epoch by, and what `test_best` is the best of.
SELECTION_METRIC = "ndcg@10"
#: The same of the ranking task: steps/evaluation/clicks.py. NE is lower the better, and selects.
CLICK_NAMES = ("ne", "auc", "gauc", "log_loss", "calibration")
