"""Training: the step, the trainer and the loop over epochs of a run. `run.py` is the way in, `step.py` the innermost part."""
