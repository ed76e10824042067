"""Names and addresses: every cluster's are its own."""

from __future__ import annotations

import itertools

import pytest

from devcluster.cluster.model import BLOCK, MAX_CLUSTERS, MAX_NODES, Layout, number_of


def test_clusters_do_not_overlap() -> None:
    networks = [Layout("c", index).network for index in range(MAX_CLUSTERS)]
    assert all(network.subnet_of(BLOCK) for network in networks)
    assert not any(one.overlaps(other) for one, other in itertools.combinations(networks, 2))


@pytest.mark.parametrize("index", range(MAX_CLUSTERS))
def test_parts_of_a_cluster_do_not_overlap(index: int) -> None:
    layout = Layout("c", index)
    parts = [layout.bridge_network, layout.service_network, layout.pod_network]
    assert all(part.subnet_of(layout.network) for part in parts)
    assert not any(one.overlaps(other) for one, other in itertools.combinations(parts, 2))


def test_nodes_have_addresses_and_pods_of_their_own() -> None:
    layout = Layout("c", 3)
    nodes = [layout.node(number) for number in range(1, MAX_NODES + 1)]
    assert all(node.pods.subnet_of(layout.pod_network) for node in nodes)
    assert len({node.pods for node in nodes}) == len({node.address for node in nodes}) == MAX_NODES
    assert not {layout.host_address, layout.dns_address} & {node.address for node in nodes}


def test_link_names_fit_the_kernel() -> None:
    layout = Layout("a" * 32, MAX_CLUSTERS - 1)
    assert len(layout.prefix) <= 15
    assert len(layout.node(MAX_NODES).link) <= 15


@pytest.mark.parametrize("name", ["", "A", "-a", "a-", "a/b", "a" * 33, ".."])
def test_bad_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cluster name"):
        Layout(name, 0)


def test_node_numbers() -> None:
    assert number_of("node-12") == 12
    with pytest.raises(ValueError, match="not a node"):
        number_of("n1")
    with pytest.raises(ValueError, match="1 to"):
        Layout("c", 0).node(0)
