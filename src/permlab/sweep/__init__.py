"""The door to studies: `python -m permlab.sweep`."""
