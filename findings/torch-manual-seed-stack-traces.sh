#!/usr/bin/env bash
# torch 2.13.0: each torch.manual_seed formats stack traces, one for each kind of accelerator that is not in use.
#
# It seeds all kinds of devices. For CUDA, XPU and MTIA the call is kept until the device is first used, with the stack
# trace of who asked for it. On a machine with NVIDIA GPUs alone that is two traces each time, on one without GPUs
# three, for as long as the program runs. The deeper the stack, the longer it takes; the generator's own seeding, with
# the same random numbers on the CPU, takes a microsecond. A program that seeds each step of a small model spends more
# time on that than on launching the step as a CUDA graph.
#
# Seen: traces by a call of torch.manual_seed: 3; again: 3; time beside that of the default generator's manual_seed:
# 98 times in a shallow stack, 290 times in one 40 calls deep
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment torch==2.13.0 numpy==2.4.6
CUDA_VISIBLE_DEVICES="" python - <<'PYTHON'
import time
import traceback

import torch

formatted = []
original = traceback.format_stack
traceback.format_stack = lambda *given, **named: formatted.append(original(*given, **named)) or formatted[-1]
counts = []
for _ in range(2):
    torch.manual_seed(0)
    counts.append(len(formatted))
    formatted.clear()


def at(depth, call):
    return call() if depth <= 1 else at(depth - 1, call)


def microseconds(seed):
    begun = time.perf_counter()
    for number in range(300):
        seed(number)
    return (time.perf_counter() - begun) / 300 * 1e6


traceback.format_stack = original
ratios = [
    at(depth, lambda: microseconds(torch.manual_seed)) / at(depth, lambda: microseconds(torch.default_generator.manual_seed))
    for depth in (2, 40)
]
torch.manual_seed(3)
expected = torch.rand(4)
torch.default_generator.manual_seed(3)
print(f"traces by a call of torch.manual_seed: {counts[0]}; again: {counts[1]}; time beside that of the default", end=" ")
print(f"generator's manual_seed: {ratios[0]:.0f} times in a shallow stack, {ratios[1]:.0f} times in one 40 calls deep")
assert torch.equal(torch.rand(4), expected)
assert counts == [3, 3], "changed: another number of stack traces"
assert min(ratios) > 10
PYTHON
