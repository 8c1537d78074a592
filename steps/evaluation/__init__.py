"""How recommendations are judged: exact ranks over all candidates, and metrics from ranks.

One evaluation for the learning curve and for the final figures.
"""
