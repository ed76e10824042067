"""In-memory implementations of the operator's seams. They behave as the real part does, or raise."""
