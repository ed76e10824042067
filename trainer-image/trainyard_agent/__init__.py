"""The agent: PID 1 of every worker pod. Standard library and `trainyard_api` only.

One thread, the main one, owns all state and all child processes; it sits in one `selectors` loop (`agent.py`).
Two threads talk HTTP (`coordinator.py`) and one copies the workers' output (`logpump.py`); they share nothing
with the main thread but immutable values that are handed over through a lock or a queue. So there is no
state that two threads may change, and a slow coordinator or a full log can never delay a kill.
"""
