"""The steps of the reproduction: one file, one step, one command line (`python -m steps.<name>`)."""

import os

# Before torch is imported, whose OpenMP reads it then. By default its threads spin while they wait: two trainings on
# two cores then take each other's cores, and one epoch of a small model 5 to 10 times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
