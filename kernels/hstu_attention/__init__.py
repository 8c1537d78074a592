"""HSTU's pointwise attention over jagged sequences, with its relative attention bias; and its softmax ablation."""

from kernels.hstu_attention.naive import TIME_BUCKETS, hstu_attention, softmax_attention, time_bucket

__all__ = ["TIME_BUCKETS", "hstu_attention", "softmax_attention", "time_bucket"]
