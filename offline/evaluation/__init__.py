"""Measuring what atoms do to free-running answers: one harness behind `evaluate`, `sweep` and `label --from-detectors`."""
