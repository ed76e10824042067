"""`self.log`: from a value in a step to callbacks, loggers and the progress bar."""
