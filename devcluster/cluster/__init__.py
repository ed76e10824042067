"""A real Kubernetes cluster on this machine: every part of it is the true program, none is emulated."""

from devcluster.cluster.lifecycle import Cluster
from devcluster.cluster.registry import leftovers
from devcluster.cluster.standalone import ControlPlane
from devcluster.errors import DevclusterError

__all__ = ["Cluster", "ControlPlane", "DevclusterError", "leftovers"]
