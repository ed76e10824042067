"""The operator: kopf is the shell, `plan` decides, `apply` does."""
