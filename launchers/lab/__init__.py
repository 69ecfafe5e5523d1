"""The experiment harness behind `experiment.py`."""
