"""Downloads that go wrong: one clear error, and nothing half-written where an asset is looked for."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
import zipfile
from pathlib import Path

import pytest

from accessory.data import assets
from accessory.data.assets import ASSETS, Asset, AssetError
from accessory.data.fetch import fetch


def tgz(files: dict[str, bytes], link: str = "") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as bundle:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            bundle.addfile(info, io.BytesIO(content))
        if link:
            info = tarfile.TarInfo("package/link")
            info.type, info.linkname = tarfile.SYMTYPE, link
            bundle.addfile(info)
    return buffer.getvalue()


GOOD = tgz({"package/a.txt": b"hello" * 100})


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Asset:
    """An npm asset whose client is a shell script in an otherwise empty PATH folder."""
    asset = Asset("toy", "npm", "toy", "1.0", "toy-1.0.tgz", hashlib.sha256(GOOD).hexdigest(), "MIT", len(GOOD))
    monkeypatch.setitem(ASSETS, "toy", asset)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return asset


def client(tmp_path: Path, blob: bytes, name: str = "npm", exit_code: int = 0, say: str = "", sleep: int = 0) -> None:
    """A stand-in for a registry's client: leaves ``blob`` in the working folder."""
    (tmp_path / "blob").write_bytes(blob)
    counted = tmp_path / "calls"
    script = f"#!/bin/sh\necho x >> {counted}\n/bin/cat {tmp_path}/blob > toy-1.0.tgz\n"
    script += f"echo '{say}' >&2\n/bin/sleep {sleep}\nexit {exit_code}\n"
    path = tmp_path / "bin" / name
    path.write_text(script)
    path.chmod(0o755)


def left(cache: Path) -> list[str]:
    return sorted(p.name for p in cache.iterdir() if p.name != ".lock")


def test_the_client_is_used_once(toy: Asset, tmp_path: Path) -> None:
    client(tmp_path, GOOD)
    cache = tmp_path / "cache"
    for _ in range(2):
        assert (fetch(["toy"], cache, progress=False)["toy"] / "a.txt").read_bytes() == b"hello" * 100
    assert (tmp_path / "calls").read_text() == "x\n"
    assert left(cache) == ["toy-1.0"]


def test_missing_npm_says_what_to_do(toy: Asset, tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=r"npm is not installed.*Install Node.js"):
        fetch(["toy"], tmp_path / "cache", progress=False)
    assert left(tmp_path / "cache") == []


def test_a_failing_client_is_quoted(toy: Asset, tmp_path: Path) -> None:
    client(tmp_path, b"", exit_code=7, say="no route to registry")
    with pytest.raises(AssetError, match=r"exit 7: no route to registry.*run it again"):
        fetch(["toy"], tmp_path / "cache", progress=False)
    assert left(tmp_path / "cache") == []


@pytest.mark.parametrize("blob", [GOOD[:-40], GOOD + b"x", b""], ids=["torn", "longer", "empty"])
def test_wrong_bytes_are_refused_then_the_next_run_mends_it(toy: Asset, tmp_path: Path, blob: bytes) -> None:
    cache = tmp_path / "cache"
    client(tmp_path, blob)
    with pytest.raises(AssetError, match=r"has sha256 .*expected " + toy.sha256[:8]):
        fetch(["toy"], cache, progress=False)
    assert left(cache) == []
    assert assets.find("toy", cache) is None
    client(tmp_path, GOOD)
    assert (fetch(["toy"], cache, progress=False)["toy"] / "a.txt").is_file()


@pytest.mark.parametrize("name", ["../evil.txt", "package/../../evil.txt", "/tmp/evil.txt", "package//abs/../../../e"])
def test_paths_that_leave_the_folder_are_refused(
    toy: Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    blob = tgz({"package/fine.txt": b"ok", name: b"evil"})
    bad = Asset("toy", "npm", "toy", "1.0", toy.file, hashlib.sha256(blob).hexdigest(), "MIT", len(blob))
    monkeypatch.setitem(ASSETS, "toy", bad)
    client(tmp_path, blob)
    with pytest.raises(AssetError, match="unsafe path"):
        fetch(["toy"], tmp_path / "cache", progress=False)
    assert left(tmp_path / "cache") == []
    assert not list(tmp_path.rglob("evil.txt"))


def test_a_wheel_that_leaves_the_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "archives").mkdir()
    archive = tmp_path / "archives" / "toy-1.0.whl"
    with zipfile.ZipFile(archive, "w") as bundle:
        bundle.writestr("../evil.txt", "evil")
    sha = hashlib.sha256(archive.read_bytes()).hexdigest()
    monkeypatch.setitem(ASSETS, "toy", Asset("toy", "pypi", "toy", "1.0", archive.name, sha, "MIT", 1))
    with pytest.raises(AssetError, match="unsafe path"):
        fetch(["toy"], tmp_path / "cache", progress=False, archives=archive.parent)
    assert left(tmp_path / "cache") == []


def test_links_are_left_out_and_bombs_refused(toy: Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blob = tgz({"package/a.txt": b"hello"}, link="/etc/passwd")
    sha = hashlib.sha256(blob).hexdigest()
    monkeypatch.setitem(ASSETS, "toy", Asset("toy", "npm", "toy", "1.0", toy.file, sha, "MIT", 1))
    client(tmp_path, blob)
    folder = fetch(["toy"], tmp_path / "cache", progress=False)["toy"]
    assert sorted(p.name for p in folder.iterdir()) == [".complete", "a.txt"]

    blob = tgz({"package/zeros": bytes(1_000_000)})
    sha = hashlib.sha256(blob).hexdigest()
    monkeypatch.setitem(ASSETS, "toy", Asset("toy", "npm", "toy", "2.0", toy.file, sha, "MIT", 1, limit=999_999))
    client(tmp_path, blob)
    with pytest.raises(AssetError, match="more than 999999 bytes"):
        fetch(["toy"], tmp_path / "cache", progress=False)
    assert left(tmp_path / "cache") == ["toy-1.0"]


def test_a_fallback_is_tried_and_both_errors_are_told(
    toy: Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Asset("toy", "deb", "toy", "0.9", "toy.deb", "0" * 64, "MIT", 1, fallback=toy)
    monkeypatch.setitem(ASSETS, "toy", first)
    with pytest.raises(AssetError, match=r"apt-get is not installed.*; npm is not installed"):
        fetch(["toy"], tmp_path / "cache", progress=False)
    client(tmp_path, GOOD)
    assert fetch(["toy"], tmp_path / "cache", progress=False)["toy"].name == "toy-1.0"


def test_a_killed_run_leaves_nothing_that_looks_finished(toy: Asset, tmp_path: Path) -> None:
    """SIGKILL in the middle of a download; the next run clears the remains and finishes."""
    client(tmp_path, GOOD, sleep=20)
    cache = tmp_path / "cache"
    code = f"""
        from pathlib import Path
        from accessory.data import assets, fetch
        asset = assets.Asset("toy", "npm", "toy", "1.0", "toy-1.0.tgz", {toy.sha256!r}, "MIT", 1)
        assets.ASSETS["toy"] = asset
        fetch.fetch(["toy"], Path({str(cache)!r}), progress=False)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], start_new_session=True)
    deadline = time.monotonic() + 30
    while not list(cache.glob(".tmp-toy-*/toy-1.0.tgz")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert [p.name[:9] for p in cache.iterdir() if p.name != ".lock"] == [".tmp-toy-"]
    assert assets.find("toy", cache) is None
    client(tmp_path, GOOD)
    fetch(["toy"], cache, progress=False)
    assert left(cache) == ["toy-1.0"]


def test_a_cache_that_cannot_be_written_is_named(toy: Asset, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(AssetError, match="ACCESSORY_CACHE"):
        fetch(["toy"], tmp_path / "file" / "cache", progress=False)
