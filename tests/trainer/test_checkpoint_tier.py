"""The local tier and the copies on other nodes, with real uploader processes: found, verified, bounded, never in the way."""

from __future__ import annotations

import json
import re
import shutil
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from devcluster.s3 import S3Server
from tests.fakes.s3_proxy import S3Proxy
from tests.trainer.forkhost import Host
from tests.trainer.test_resume_exact import DIGITS, SMALL, wait_for_step
from tests.trainer.tier_nodes import PART, Node, content, read, together, until
from trainyard.checkpoint.commitlog import CommitLog
from trainyard.checkpoint.errors import CheckpointError, NotFound, ShardInvalid, StoreUnavailable
from trainyard.checkpoint.store_s3 import S3Store
from trainyard.checkpoint.tier.keeper import Keeper
from trainyard.checkpoint.tier.peer import PeerSource
from trainyard.checkpoint.tier.server import PeerServer
from trainyard.checkpoint.tier.wire import Address, Declined, WireError, connect
from trainyard.peers import Alone
from trainyard_api.checkpoints import Record, commits_newest_first

pytestmark = pytest.mark.usefixtures("s3_credentials")
Start = Callable[..., list[Node]]


@pytest.fixture
def start(run_env: dict[str, str], tmp_path: Path) -> Iterator[Start]:
    """Starts so many nodes."""
    begun: list[Node] = []

    def go(count: int, copies: int = 1, *arguments: str) -> list[Node]:
        env = {**run_env, "TRAINYARD_CHECKPOINT_LOCAL": "1", "TRAINYARD_CHECKPOINT_COPIES": str(copies)}
        nodes = [
            Node(rank, tmp_path / f"n{rank}", dict(env), list(arguments)).start() for rank in range(count)
        ]
        begun.extend(nodes)
        for node in nodes:
            node.worker()
        return nodes

    yield go
    for node in begun:
        node.stop()


@pytest.fixture
def store(prefix: str) -> S3Store:
    return S3Store(prefix, "run-1")


def newest(store: S3Store) -> Record:
    return commits_newest_first(CommitLog(store, "run-1").refresh())[0]


def save(nodes: list[Node], step: int, **more: int) -> None:
    for node in nodes:
        node.save(step, len(nodes), **more)
    assert [node.outcome().op for node in nodes] == ["committed", *["uploaded"] * (len(nodes) - 1)]


def copied(node: Node, step: int) -> bool:
    return bool(list(node.staging.glob(f"copies/data/step-{step:012d}/*/*.json")))


def test_a_replaced_node_gets_its_shards_from_its_neighbour(start: Start, store: S3Store) -> None:
    nodes = start(3)
    together(nodes, lambda tier: tier.announce())
    save(nodes, 10, size=PART + 5000)
    for node in nodes:
        until(lambda: copied(node, 10))  # noqa: B023 - called at once
    lost = nodes[1]
    lost.kill()
    shutil.rmtree(lost.folder)
    lost.start()
    record = newest(store)
    sources = together(nodes, lambda tier: tier.sources(record))
    assert [[s.name for s in found] for found in sources] == [
        ["local", "local", "peer"], ["peer", "peer"], ["local", "local", "peer"]
    ]  # fmt: skip
    for rank, shard in enumerate(record.shards):
        held = []
        for source in sources[1]:
            try:
                held.append(read(source, shard))
            except NotFound:
                continue
        assert held and set(held) == {content(10, rank, PART + 5000)}


def test_an_in_place_restart_knows_the_log_and_has_its_shards(start: Start, store: S3Store) -> None:
    (node,) = start(1, 0)
    save([node], 10)
    save([node], 20)
    record = newest(store)
    tier = together([node], lambda tier: tier)[0] if False else node.tier(Alone())
    assert tier.known_records() == CommitLog(store, "run-1").refresh()
    (source,) = tier.sources(record)
    assert (source.name, read(source, record.shards[0])) == ("local", content(20, 0, 100_000))
    assert node.tier(Alone(), attempt=3).known_records() is None, (
        "an attempt in between may have written elsewhere"
    )
    assert node.tier(Alone(), attempt=1).known_records() is None
    fence = Record(kind="fence", seq=3, run="run-1", attempt=2, step=20, time=0.0, parent=2)
    tier.announce([*CommitLog(store, "run-1").refresh(), fence])
    known = node.tier(Alone(), attempt=3).known_records()
    assert known is not None
    assert known[-1] == fence


def flip(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ 1]))


def test_a_flipped_byte_in_a_kept_copy_is_refused(start: Start, store: S3Store) -> None:
    nodes = start(2)
    together(nodes, lambda tier: tier.announce())
    save(nodes, 10)
    until(lambda: copied(nodes[1], 10))
    record = newest(store)
    shard = record.shards[0]
    flip(nodes[0].staging / shard.key, 70_000)
    flip(nodes[1].staging / "copies" / shard.key, 80_000)
    mine, _, peer = together(nodes, lambda tier: tier.sources(record))[0]
    for source in (mine, peer):
        with pytest.raises(CheckpointError, match="damaged"):
            read(source, shard)
    descriptor = (nodes[0].staging / shard.key).with_suffix(".json")
    descriptor.write_text(descriptor.read_text().replace('"size": 100000', '"size": 100001'))
    with pytest.raises(ShardInvalid):
        mine.descriptor(shard)


def test_bytes_that_are_not_what_their_descriptor_says_are_never_kept(start: Start, store: S3Store) -> None:
    nodes = start(2, 0)
    together(nodes, lambda tier: tier.announce())
    address = address_of(nodes[1])
    save([nodes[0]], 10)
    shard = newest(store).shards[0]
    descriptor = json.loads((nodes[0].staging / shard.key).with_suffix(".json").read_text())
    line = connect(address)
    assert line.ask({"op": "keep", "descriptor": descriptor})["have"] is False
    line._socket.sendall(b"x" * shard.size)
    with pytest.raises(Declined, match="not what they should be"):
        line.answer()
    line.close()
    assert not list(nodes[1].staging.glob("copies/**/*.safetensors"))
    until(lambda: not list(nodes[1].staging.glob("copies/**/.*.tmp")))


def address_of(node: Node) -> Address:
    data = json.loads((node.staging / "peers.json").read_text())["address"]
    return Address(**data)


def test_the_token_is_asked_for_and_told_to_nobody(start: Start, store: S3Store) -> None:
    nodes = start(2)
    together(nodes, lambda tier: tier.announce())
    save(nodes, 10)
    shard = newest(store).shards[0]
    address = address_of(nodes[0])
    with pytest.raises(WireError, match="refuses the token"):
        connect(replace(address, token="0" * 64))
    source = PeerSource(replace(address, token="0" * 64), [shard.key])
    with pytest.raises(StoreUnavailable) as refusal:
        source.descriptor(shard)
    assert read(PeerSource(address, [shard.key]), shard) == content(10, 0, 100_000)
    for node in nodes:
        assert node.process is not None
        token = address_of(node).token
        assert len(token) == 64
        assert stat.S_IMODE((node.staging / "peers.json").stat().st_mode) == 0o600
        assert stat.S_IMODE(Path(node.socket).stat().st_mode) == 0o600
        seen = Path(f"/proc/{node.process.pid}/environ").read_bytes()
        seen += Path(f"/proc/{node.process.pid}/cmdline").read_bytes() + node.log.encode()
        assert token.encode() not in seen
        assert token not in repr(address_of(node)) + str(refusal.value)


def test_what_is_asked_over_the_line_cannot_leave_the_folder(start: Start, store: S3Store) -> None:
    (node,) = start(1, 1)
    together([node], lambda tier: tier.announce())
    save([node], 10)
    shard = newest(store).shards[0]
    line = connect(address_of(node))
    asked = [
        {"op": "read", "key": "../../../../etc/passwd", "begin": 0, "size": 10},
        {"op": "read", "key": "peers.json", "begin": 0, "size": 10},
        {"op": "descriptor", "key": shard.key.replace("data/", "copies/data/")},
        {"op": "read", "key": shard.key, "begin": -5, "size": 10},
        {"op": "read", "key": shard.key, "begin": 0, "size": shard.size + 1},
        {"op": "read", "key": shard.key, "begin": 0},
        {"op": "read", "key": shard.key, "begin": "x", "size": []},
        {"op": "keep", "descriptor": {"shard": {}, "parts": []}},
        {"op": "keep"}, {"op": "fly"}, {"op": []}, {},
    ]  # fmt: skip
    for message in asked:
        with pytest.raises(Declined):
            line.ask(message)
    evil = json.loads((node.staging / shard.key).with_suffix(".json").read_text())
    evil["shard"]["key"] = "data/../../../evil"
    with pytest.raises(Declined, match="not the key of a shard"):
        line.ask({"op": "keep", "descriptor": evil})
    assert line.ask({"op": "read", "key": shard.key, "begin": 5, "size": 0})["ok"]
    line.close()
    raw = socket.create_connection(address_of(node).place, timeout=10)
    raw.sendall(b"GET / HTTP/1.1\r\nHost: somebody\r\n\r\n")
    assert b"200" not in raw.recv(4096)
    raw.close()
    save([node], 20)  # nothing of it has done any harm


def test_too_many_connections_are_turned_away(tmp_path: Path) -> None:
    server = PeerServer(Keeper(tmp_path, keep=True), "127.0.0.1")
    silent = [socket.create_connection(server.address.place, timeout=10) for _ in range(64)]
    for one in silent:
        assert one.recv(100)
    late = socket.create_connection(server.address.place, timeout=10)
    assert late.recv(100) == b""
    for one in (*silent, late):
        one.close()
    until(lambda: _answers(server.address))
    server.close()


def _answers(address: Address) -> bool:
    try:
        connect(address).close()
    except OSError:
        return False
    return True


def test_an_uploader_that_is_killed_while_it_takes_a_copy(start: Start, store: S3Store) -> None:
    """What came by then does not count; the sender tries again, and finds the next one at the same address."""
    nodes = start(2)
    together(nodes, lambda tier: tier.announce())
    before = address_of(nodes[1])
    size = 6 * PART
    assert nodes[1].process is not None
    for node in nodes:
        node.save(10, 2, size=size)
    until(lambda: list(nodes[1].staging.glob("copies/**/.*.tmp")))
    nodes[1].kill()
    assert not list(nodes[1].staging.glob("copies/**/*.json"))
    nodes[1].start()
    assert nodes[0].outcome(60).op == "committed"
    until(lambda: copied(nodes[1], 10))
    assert address_of(nodes[1]) == before
    assert not list(nodes[1].staging.glob("copies/**/.*.tmp"))
    assert read(PeerSource(before, [newest(store).shards[0].key]), newest(store).shards[0]) == content(
        10, 0, size
    )


def test_a_node_that_is_away_is_one_warning_and_no_delay(start: Start, store: S3Store) -> None:
    nodes = start(2)
    together(nodes, lambda tier: tier.announce())
    warnings = listen(nodes[0])
    assert nodes[1].uploads is not None
    nodes[1].uploads.close()
    nodes[1].kill()
    for step in (10, 20, 30):
        save(nodes[:1], step)
    until(lambda: any("did not take" in text for text in warnings))
    save(nodes[:1], 40)
    time.sleep(2 * 3.5)  # two more rounds of tries
    assert len([text for text in warnings if "did not take" in text]) == 1


def listen(node: Node) -> list[str]:
    """The warnings that the node's agent would hear from now on."""
    heard: list[str] = []
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(node.socket)
    connection.sendall(b'{"op":"subscribe"}\n')

    def run() -> None:
        with connection, connection.makefile() as lines:
            for line in lines:
                message = json.loads(line)
                if message["op"] == "warning":
                    heard.append(message["message"])

    threading.Thread(target=run, daemon=True).start()
    return heard


def held(node: Node) -> dict[str, int]:
    """How many files of shards there are on the node, by folder."""
    count = {"data": 0, "copies": 0, "free": 0}
    for path in node.outside.rglob("*.safetensors"):
        count[path.relative_to(node.outside).parts[0]] += 1
    return count


def test_what_is_kept_is_bounded(start: Start, store: S3Store) -> None:
    nodes = start(3, 2)
    together(nodes, lambda tier: tier.announce())
    for step in range(10, 60, 10):
        save(nodes, step)
        for node in nodes:
            until(lambda: copied(node, step))  # noqa: B023 - called at once
    for node in nodes:
        until(lambda: held(node) == {"data": 1, "copies": 2, "free": 1})  # noqa: B023


def test_a_node_that_hears_nothing_of_commits_keeps_two_at_most(start: Start) -> None:
    nodes = start(2, 0)
    for step in range(10, 60, 10):
        save(nodes, step)
    assert held(nodes[0]) == {"data": 1, "copies": 0, "free": 1}
    assert held(nodes[1])["data"] <= 2


@pytest.fixture
def namespaces() -> None:
    probe = subprocess.run(["unshare", "-Urm", "true"], capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.skip(f"no mount namespaces here: {probe.stderr.strip()}")


@pytest.mark.usefixtures("namespaces")
def test_a_disk_with_room_for_one_save_switches_the_tier_off_and_no_more(
    run_env: dict[str, str], tmp_path: Path, store: S3Store
) -> None:
    env = {**run_env, "TRAINYARD_CHECKPOINT_LOCAL": "1"}
    node = Node(0, tmp_path / "small", env, limit=3).start()
    try:
        node.worker()
        warnings = listen(node)
        for step in (10, 20, 30):
            save([node], step, size=2 << 20)
        until(lambda: warnings)
        assert len(warnings) == 1
        assert "no room for two saves" in warnings[0]
        assert held(node) == {"data": 0, "copies": 0, "free": 1}
        assert newest(store).step == 30
    finally:
        node.stop()


@pytest.mark.usefixtures("namespaces")
def test_a_disk_without_room_for_a_copy_is_the_copys_problem_alone(
    run_env: dict[str, str], tmp_path: Path, store: S3Store
) -> None:
    env = {**run_env, "TRAINYARD_CHECKPOINT_LOCAL": "1", "TRAINYARD_CHECKPOINT_COPIES": "1"}
    nodes = [Node(n, tmp_path / f"n{n}", dict(env), limit=5 * n).start() for n in range(2)]
    try:
        for node in nodes:
            node.worker()
        together(nodes, lambda tier: tier.announce())
        warnings = listen(nodes[0])
        for step in (10, 20):
            save(nodes, step, size=2 << 20)
        until(lambda: any("no room" in text for text in warnings))
        until(lambda: held(nodes[1]) == {"data": 1, "copies": 0, "free": 1})
        assert newest(store).step == 20
    finally:
        for node in nodes:
            node.stop()


def test_an_in_place_restart_reads_nothing_from_the_bucket(
    host: Host, s3: S3Server, run_env: dict[str, str], tmp_path: Path
) -> None:
    """Killed and started again, a real trainer: until it trains again, the server sees the fence, and a probe."""
    with S3Proxy(s3.access) as server:
        env = {**run_env, "TRAINYARD_CHECKPOINT_ENDPOINT": server.url, "TRAINYARD_CHECKPOINT_LOCAL": "1"}
        node = Node(0, tmp_path / "node", env).start()
        try:
            node.worker()
            warnings = listen(node)
            (rank,) = host.start([DIGITS, *SMALL, "--sample-log", str(tmp_path / "a")], env=node.env)
            wait_for_step(tmp_path / "a" / "rank-0.jsonl", 8, rank)
            rank.kill()
            host.wait([rank])
            node.worker().flush(20)
            time.sleep(0.5)  # the deletion of what was replaced
            before = len(server.seen)
            again = {**node.env, "TRAINYARD_ATTEMPT": "2", "TRAINYARD_CHECKPOINT_EVERY_STEPS": "1000"}
            (rank,) = host.start([DIGITS, *SMALL, "--sample-log", str(tmp_path / "b")], env=again)
            wait_for_step(tmp_path / "b" / "rank-0.jsonl", 9, rank)
            rank.kill()
            host.wait([rank])
            resumed = re.search(r"resumed at step (\d+)", rank.output)
            assert resumed, rank.output
            assert int(resumed[1]) >= 3
            seen = server.seen[before:]
            assert {request.method for request in seen} == {"PUT"}, seen
            (fence,) = [request for request in seen if "/probe/" not in request.path]
            assert "/commits/" in fence.path
            (third,) = host.start(
                [DIGITS, *SMALL, "--sample-log", str(tmp_path / "c")],
                env={**node.env, "TRAINYARD_ATTEMPT": "3"},
            )
            assert host.wait([third], 60) == [0], third.output
            assert not warnings
        finally:
            node.stop()
