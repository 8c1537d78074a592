"""The steps of the reproduction: one file, one step, one command line (`python -m steps.<name>`)."""

import os

# Before torch is imported. Threads that wait for one another sleep: spinning, two trainings on two cores took several
# times the CPU time of two that take turns.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
