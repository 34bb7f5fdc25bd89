"""The feature cache: whole rows or none, and never another's."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from accessory.diffusion.condition import Condition
from accessory.diffusion.latent_cache import (
    CacheReader,
    CacheWriter,
    condition_of,
    fingerprint,
    rows_of,
    text_key,
    write_atomic,
)

MADE = {"codec": "abc", "profile": "def"}


def row(i: int) -> dict[str, Tensor]:
    return {"latent": torch.full((2, i + 1), float(i)), "seq": torch.arange(i).bfloat16()}


def fill(folder: Path, keys: range, **options: int) -> None:
    with CacheWriter(folder, MADE, **options) as cache:
        for i in keys:
            if f"k/{i}" not in cache:
                cache.add(f"k/{i}", row(i))


def check(folder: Path, count: int) -> None:
    cache = CacheReader(folder, MADE)
    assert len(cache) == count
    assert set(cache) == {f"k/{i}" for i in range(count)}
    for i in range(count):
        found = cache[f"k/{i}"]
        assert set(found) == {"latent", "seq"}
        assert all(torch.equal(found[name], t) and found[name].dtype == t.dtype for name, t in row(i).items())


def test_rows_come_back_in_shards(tmp_path: Path) -> None:
    fill(tmp_path, range(20), shard_bytes=100)
    assert len(list(tmp_path.glob("*.safetensors"))) > 5
    check(tmp_path, 20)
    check_pickled = pickle.loads(pickle.dumps(CacheReader(tmp_path, MADE)))
    assert torch.equal(check_pickled["k/3"]["latent"], row(3)["latent"])
    with pytest.raises(ValueError, match="no row 'k/99'"):
        CacheReader(tmp_path, MADE)["k/99"]


def test_a_second_run_adds_what_is_missing(tmp_path: Path) -> None:
    fill(tmp_path, range(6), shard_bytes=100)
    before = {p.name: p.read_bytes() for p in tmp_path.glob("*.safetensors")}
    fill(tmp_path, range(12), shard_bytes=100)
    check(tmp_path, 12)
    assert all((tmp_path / name).read_bytes() == data for name, data in before.items())
    with CacheWriter(tmp_path, MADE) as cache, pytest.raises(ValueError, match="has a row 'k/3' already"):
        cache.add("k/3", row(3))


def _slow(folder: Path, go: object) -> None:
    with CacheWriter(folder, MADE, shard_bytes=100) as cache:
        for i in range(1000):
            cache.add(f"k/{i}", row(i))
            time.sleep(0.002)


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_slow, args=(tmp_path, None))
    process.start()
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("*.safetensors"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    kept = len(CacheReader(tmp_path, MADE))
    assert 0 < kept < 1000
    count = kept + 5
    fill(tmp_path, range(count), shard_bytes=100)
    check(tmp_path, count)


def test_what_a_kill_can_leave_is_cleaned_up(tmp_path: Path) -> None:
    fill(tmp_path, range(8), shard_bytes=1)
    index = tmp_path / "index-0.jsonl"
    lines = index.read_bytes().splitlines(keepends=True)
    assert len(lines) == 9
    index.write_bytes(b"".join(lines[:-1]) + lines[-1][:10])  # the last shard is there, its line is torn
    (tmp_path / ".rows-0-000009.safetensors.77.tmp").write_bytes(b"half")
    assert len(CacheReader(tmp_path, MADE)) == 7
    fill(tmp_path, range(8), shard_bytes=1)
    check(tmp_path, 8)
    assert not list(tmp_path.glob(".*"))
    index.write_bytes(lines[0][:7])  # killed in its first line
    with pytest.raises(ValueError, match="holds no feature cache"):
        CacheReader(tmp_path, MADE)
    fill(tmp_path, range(8))
    check(tmp_path, 8)


def test_rows_of_another_maker_are_refused(tmp_path: Path) -> None:
    fill(tmp_path, range(3))
    other = MADE | {"codec": "xyz"}
    with pytest.raises(ValueError, match="made by something else"):
        CacheReader(tmp_path, other)
    with pytest.raises(ValueError, match="codec: abc, not xyz"):
        CacheWriter(tmp_path, other)
    with pytest.raises(ValueError, match="size: nothing, not 64"):
        CacheReader(tmp_path, MADE | {"size": "64"})
    with pytest.raises(ValueError, match="codec: abc, not xyz"):
        CacheWriter(tmp_path, other, writer=1)  # nor beside them in the folder
    check(tmp_path, 3)


def test_torn_and_foreign_files_are_named(tmp_path: Path) -> None:
    fill(tmp_path, range(8), shard_bytes=100)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-3])
    with pytest.raises(ValueError, match=f"{shard.name} is {len(whole) - 3} bytes, the index says {len(whole)}"):
        CacheReader(tmp_path, MADE)
    shard.unlink()
    with pytest.raises(ValueError, match="is missing"):
        CacheWriter(tmp_path, MADE)
    index = tmp_path / "index-0.jsonl"
    header = index.read_text().splitlines()[0]
    index.write_text(header + '\n{"file": "../x.safetensors", "bytes": 3, "keys": []}\n')
    with pytest.raises(ValueError, match="outside its folder"):
        CacheReader(tmp_path, MADE)
    index.write_text("[]\n")
    with pytest.raises(ValueError, match="not the index of a feature cache"):
        CacheReader(tmp_path, MADE)
    index.write_text(header.replace("features-1", "features-9") + "\n")
    with pytest.raises(ValueError, match="has format 'accessory-features-9'"):
        CacheReader(tmp_path, MADE)


def test_writers_share_a_folder_but_not_a_number(tmp_path: Path) -> None:
    with CacheWriter(tmp_path, MADE, writer=0) as a, CacheWriter(tmp_path, MADE, writer=1) as b:
        a.add("k/0", row(0))
        b.add("k/1", row(1))
        with pytest.raises(ValueError, match=r"another process is writing .* as writer 1"):
            CacheWriter(tmp_path, MADE, writer=1)
    check(tmp_path, 2)
    with CacheWriter(tmp_path, MADE, writer=1) as b:
        assert "k/0" in b


def _hold(folder: Path, first: int, ready: Connection) -> None:
    with CacheWriter(folder, MADE, shard_bytes=1) as cache:
        for i in range(first, first + 3):
            cache.add(f"k/{i}", row(i))
        cache._limit = 10**9
        cache.add(f"k/{first + 3}", row(first + 3))  # pending: gone with a kill
        ready.send(sorted(p.name for p in folder.glob("index-*")))
        ready.recv()


def test_runs_side_by_side_take_numbers_of_their_own(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    runs = []
    for first in (0, 3):
        here, there = fork.Pipe()
        process = fork.Process(target=_hold, args=(tmp_path, first, there))
        process.start()
        assert here.poll(60)
        runs.append((process, here, here.recv()))
    assert runs[1][2] == ["index-0.jsonl", "index-1.jsonl"]
    check(tmp_path, 6)  # a reader sees what both have finished
    os.kill(runs[0][0].pid or 0, signal.SIGKILL)
    runs[0][0].join()
    (tmp_path / ".rows-0-000003.safetensors.77.tmp").write_bytes(b"half")
    with CacheWriter(tmp_path, MADE) as cache:  # the number of the dead is free again, that of the living is not
        assert len(cache) == 6
        cache.add("k/6", row(6))
    assert (tmp_path / "rows-0-000003.safetensors").is_file()
    assert not list(tmp_path.glob(".*"))
    runs[1][1].send(None)
    runs[1][0].join()
    assert runs[1][0].exitcode == 0
    check(tmp_path, 7)


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    with pytest.raises(OSError, match=r"cannot lock .*No locks available; use another folder"):
        CacheWriter(tmp_path, MADE)


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, whole = CacheWriter(tmp_path, MADE, shard_bytes=1), os.write
    cache.add("k/0", row(0))
    monkeypatch.setattr(os, "write", lambda fd, data: whole(fd, data[:10]))
    with pytest.raises(OSError, match="No space left"):
        cache.add("k/1", row(1))
    monkeypatch.undo()
    cache.close()  # what was pending is tried again
    check(tmp_path, 2)


def test_bad_rows_are_refused(tmp_path: Path) -> None:
    with CacheWriter(tmp_path, MADE) as cache:
        with pytest.raises(ValueError, match="needs parts"):
            cache.add("a", {})
        with pytest.raises(ValueError, match="needs parts"):
            cache.add("a", {"x/y": torch.ones(1)})
        assert len(cache) == 0


def test_conditions_are_stored_without_padding(tmp_path: Path) -> None:
    mask = torch.tensor([[True, True, False, False], [False, True, True, True], [True, False, False, False]])
    c = Condition(torch.randn(3, 4, 5), mask, pooled=torch.randn(3, 2), sizes=torch.arange(18.0).reshape(3, 6))
    with CacheWriter(tmp_path, MADE) as cache:
        for i, stored in enumerate(rows_of(c)):
            cache.add(text_key(f"text {i}"), stored)
    reader = CacheReader(tmp_path, MADE)
    rows = [reader[text_key(f"text {i}")] for i in range(3)]
    assert [len(r["seq"]) for r in rows] == [2, 3, 1]
    back = condition_of(rows)
    assert c.seq is not None
    assert back.seq is not None
    assert back.mask is not None
    assert back.mask.tolist() == [[True, True, False], [True, True, True], [True, False, False]]
    assert torch.equal(back.seq[back.mask], c.seq[mask])
    assert torch.equal(back.pooled, c.pooled)  # type: ignore[arg-type]
    assert torch.equal(back.sizes, c.sizes)  # type: ignore[arg-type]


def test_fingerprints_see_training_and_facts() -> None:
    net = nn.Linear(200, 100)
    first = fingerprint(net, size="64")
    assert first == fingerprint(net, size="64")
    assert first != fingerprint(net, size="65")
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5)
    net(torch.randn(3, 200)).sum().backward()
    optimizer.step()
    assert first != fingerprint(net, size="64")
    assert fingerprint(net.bfloat16()) != fingerprint(net.float())
    assert text_key("a") != text_key("a ")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    write_atomic(path, b"old")

    def full(fd: int) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
