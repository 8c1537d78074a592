"""Studies: what is measured beside experiments. `<name>.py` measures, `<name>_report.py` makes its table and figure."""
