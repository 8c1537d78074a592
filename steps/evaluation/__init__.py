"""How recommendations are evaluated: exact ranks over all candidates, and metrics from ranks.

The learning curve and the final figures come from the same evaluation.
"""
