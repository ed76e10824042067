"""Parts that a Trainer is composed of and that a user may replace."""
