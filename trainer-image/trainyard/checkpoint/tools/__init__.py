"""Looking at the checkpoints of a run, and after them: what `trainyard checkpoints` does, without the command line.

Nothing here trusts what it reads, and nothing but `pruning` changes anything.
"""
