"""What a checkpoint looks like: docs/decisions/0007-checkpoint-format.md. No I/O but on bytes that are given."""
