"""The asset table and the cache: names, paths, markers, and the unpacking of each kind of archive."""

from __future__ import annotations

import argparse
import hashlib
import io
import re
import tarfile
import zipfile
from pathlib import Path

import pytest

from accessory.cli import fetch as cli
from accessory.data import assets
from accessory.data.assets import ASSETS, Asset, AssetError
from accessory.data.fetch import fetch, unpack


def tar_bytes(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as bundle:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            bundle.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def deb_bytes(files: dict[str, bytes]) -> bytes:
    def member(name: str, body: bytes) -> bytes:
        header = f"{name:<16}{'0':<12}{'0':<6}{'0':<6}{'100644':<8}{len(body):<10}`\n".encode()
        return header + body + b"\n" * (len(body) % 2)

    control = tar_bytes({"./control": b"odd"})
    return b"!<arch>\n" + b"".join(
        member(n, b)
        for n, b in (("debian-binary", b"2.0"), ("control.tar.gz", control), ("data.tar.gz", tar_bytes(files)))
    )


def test_every_asset_is_pinned() -> None:
    assert len(ASSETS) == 9
    for asset in [*ASSETS.values(), assets.NOTO_NPM]:
        assert re.fullmatch(r"[0-9a-f]{64}", asset.sha256), asset.name
        assert asset.size > 1_000_000
        assert asset.licence
        assert asset.version in asset.file
    assert len({a.sha256 for a in ASSETS.values()}) == 9


def test_notice_names_every_asset_and_licence() -> None:
    notice = (Path(__file__).parents[3] / "NOTICE").read_text()
    for asset in ASSETS.values():
        assert asset.name in notice
        assert asset.package in notice


def test_cache_is_read_from_the_environment_at_call_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ACCESSORY_CACHE", str(tmp_path / "a"))
    assert assets.default_cache() == tmp_path / "a"
    monkeypatch.setenv("ACCESSORY_CACHE", str(tmp_path / "b"))
    assert assets.default_cache() == tmp_path / "b"
    monkeypatch.delenv("ACCESSORY_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert assets.default_cache() == tmp_path / ".cache" / "accessory"


def test_a_missing_asset_says_how_to_fetch_it(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match="python -m accessory fetch openmoji"):
        assets.asset_dir("openmoji", tmp_path)
    with pytest.raises(ValueError, match=r"'opnmoji' is unknown.*smollm2"):
        assets.asset_dir("opnmoji", tmp_path)


def test_a_folder_without_its_marker_is_not_an_asset(tmp_path: Path) -> None:
    asset = ASSETS["openmoji"]
    (tmp_path / asset.folder).mkdir()
    assert assets.find("openmoji", tmp_path) is None
    (tmp_path / asset.folder / assets.MARKER).write_text("another archive\n")
    assert assets.find("openmoji", tmp_path) is None
    (tmp_path / asset.folder / assets.MARKER).write_text(asset.sha256)
    assert assets.find("openmoji", tmp_path) == tmp_path / asset.folder


def test_the_fallback_fills_the_role(tmp_path: Path) -> None:
    folder = tmp_path / assets.NOTO_NPM.folder
    folder.mkdir()
    (folder / assets.MARKER).write_text(assets.NOTO_NPM.sha256)
    assert assets.asset_dir("noto-color-emoji", tmp_path) == folder


@pytest.mark.parametrize("kind", ["whl", "tgz", "deb"])
def test_unpack_keeps_what_is_named_and_the_licence(kind: str, tmp_path: Path) -> None:
    files = {"a/one.txt": b"1", "a/b/two.txt": b"22", "c/three.txt": b"333", "LICENSE": b"MIT"}
    archive = tmp_path / f"x.{kind}"
    if kind == "whl":
        with zipfile.ZipFile(archive, "w") as bundle:
            for name, content in files.items():
                bundle.writestr(name, content)
    else:
        prefix = {"tgz": "package/", "deb": "./"}[kind]
        named = {prefix + n: c for n, c in files.items()}
        archive.write_bytes(tar_bytes(named) if kind == "tgz" else deb_bytes(named))
    asset = Asset("x", "npm", "x", "1", archive.name, "", "MIT", 1, keep=("a/",))
    unpack(asset, archive, tmp_path / "out")
    seen = {str(p.relative_to(tmp_path / "out")): p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert seen == {n: c for n, c in files.items() if not n.startswith("c/")}


def test_fetch_from_archives_is_whole_and_done_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blob = tar_bytes({"package/a.txt": b"hello"})
    asset = Asset("toy", "npm", "toy", "1.0", "toy-1.0.tgz", hashlib.sha256(blob).hexdigest(), "MIT", len(blob))
    monkeypatch.setitem(ASSETS, "toy", asset)
    archives = tmp_path / "archives"
    archives.mkdir()
    (archives / asset.file).write_bytes(blob)
    cache = tmp_path / "cache"
    assert fetch(["toy"], cache, progress=False, archives=archives) == {"toy": cache / "toy-1.0"}
    assert (cache / "toy-1.0" / "a.txt").read_bytes() == b"hello"
    (archives / asset.file).unlink()  # a second run must not need it
    monkeypatch.setenv("PATH", "")
    assert fetch(["toy"], cache, progress=False)["toy"] == cache / "toy-1.0"
    assert sorted(p.name for p in cache.iterdir()) == [".lock", "toy-1.0"]


def test_the_verb_lists_and_reports(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers())
    args = parser.parse_args(["fetch", "--list", "--cache", str(tmp_path)])
    assert cli.main(args) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in ASSETS)
    args = parser.parse_args(["fetch", "nonsense", "--cache", str(tmp_path), "--quiet"])
    with pytest.raises(ValueError, match="'nonsense' is unknown"):  # which the entry point makes an exit with 2
        cli.main(args)
    args = parser.parse_args(["fetch", "smollm", "--cache", str(tmp_path), "--quiet"])
    with pytest.raises(ValueError, match=r"did you mean smollm2\?"):
        cli.main(args)
