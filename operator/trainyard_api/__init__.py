"""What the operator, the agent, the trainer and the tools agree on. Standard library only."""
