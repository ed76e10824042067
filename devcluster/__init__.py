"""Trainyard's development cluster: a real Kubernetes on one machine, from sources that are pinned in this folder."""
