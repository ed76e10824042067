"""From a directive to running ranks: the zygote, the launcher (torchelastic), the worker, and its line to the agent.

Importing this package imports nothing else; `client` needs the standard library only.
"""
