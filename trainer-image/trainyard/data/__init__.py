"""Data modules, and the feed that makes a data position independent of the world size."""
