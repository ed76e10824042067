"""Training, evaluation and prediction: what happens in which order."""
