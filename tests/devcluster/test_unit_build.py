"""Pins: complete, and what is built depends on them."""

from __future__ import annotations

from pathlib import Path

import pytest

from devcluster.errors import DevclusterError
from devcluster.gotools import build, toolchain


def test_every_tool_is_pinned() -> None:
    for tool in build.TOOLS.values():
        folder = build.HERE / tool.module
        assert (folder / "go.sum").exists()
        text = (folder / "go.mod").read_text()
        assert tool.package in text or any((folder / name).exists() for name in ("main.go",))


def test_kubernetes_and_its_staging_modules_are_of_one_release() -> None:
    text = (build.HERE / "kubernetes" / "go.mod").read_text()
    assert f"k8s.io/kubernetes v{build.KUBERNETES}" in text
    staging = "v0." + build.KUBERNETES.partition(".")[2]
    replaced = [line for line in text.splitlines() if "=>" in line]
    assert len(replaced) > 25
    assert all(line.endswith(staging) for line in replaced)


def test_unknown_tools_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown tools"):
        build.ensure("kubeadm")


def test_envtest_binaries_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "etcd").write_text("#!/bin/sh\n")
    (tmp_path / "etcd").chmod(0o755)
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(tmp_path))
    assert build.ensure("etcd") == {"etcd": tmp_path / "etcd"}


@pytest.mark.parametrize(
    ("version", "enough"),
    [("go1.19.8", False), ("go1.25", True), ("go1.26.8", True), ("devel", False), (None, False)],
)
def test_go_versions(version: str | None, enough: bool) -> None:
    assert toolchain.new_enough(version) is enough


@pytest.mark.parametrize(
    ("setting", "first"),
    [
        ("https://one.example/,https://two.example,direct", "https://one.example"),
        ("https://one.example|direct", "https://one.example"),
        ("file:///srv/modules", "file:///srv/modules"),
    ],
)
def test_go_is_fetched_from_the_first_proxy(
    monkeypatch: pytest.MonkeyPatch, setting: str, first: str
) -> None:
    monkeypatch.setenv("GOPROXY", setting)
    assert toolchain._proxy() == first


@pytest.mark.parametrize("setting", ["off", "direct"])
def test_without_a_proxy_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    monkeypatch.setenv("GOPROXY", setting)
    with pytest.raises(DevclusterError, match="install Go"):
        toolchain._proxy()
