"""Kills a run of two ranks at random moments, again and again, and asks that the end be that of a run left in peace.

``python -m tests.faults.kills --count 100`` prints where the deaths fell. A new process would need seconds to import
torch, so every life is a fork of this one.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import io
import json
import mmap
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from accessory.data.loader import Loader
from accessory.data.mixture import Ledger, Mixture
from accessory.parallel import storage
from accessory.parallel.layout import ParallelConfig
from accessory.parallel.shard import parallelize
from accessory.train import checkpoint, loop, rng, saving
from accessory.train.config import EmaConfig, TrainConfig
from tests.toy import ToyEncoder, ToyRows, toy_model, toy_objective

STEPS, EVERY, RANKS, PER_RUN = 24, 2, 2, 10
FAULTS = ("kill", "power", "term", "full", "torn", "marker")
PHASES = ("started", "reads", "trains", "copies", "writes", "names", "prunes", "exports")
PLANS = ("ddp", "fsdp")


def train(folder: Path, plan: str, rank: int) -> str:
    """The run, from wherever ``folder`` stands; why it ended."""
    parallel = ParallelConfig(data="fsdp" if plan == "fsdp" else "ddp")
    config = TrainConfig(
        output_dir=str(folder), max_steps=STEPS, lr=0.05, batch_size=2, accumulation=2, checkpoint_every=EVERY,
        log_every=1, precision="fp32", tensorboard=False, ema=EmaConfig(0.9), parallel=parallel,
    )  # fmt: skip
    model = toy_model(dropout=0.3)
    layout = parallelize(model, parallel, [model.embed, model.output])
    ledger = Ledger(folder / "rejected.jsonl" if rank == 0 else None, max_rate=0.5)
    source = Loader(Mixture([ToyRows(7)], 3), ToyEncoder(), 2, window=3, rank=rank, world=RANKS, ledger=ledger)
    return loop.train(model, source, toy_objective, config, resume="auto", hooks=loop.Hooks(layout=layout)).reason


# --- a life ----------------------------------------------------------------------------------------------------------


def _child(folder: Path, plan: str, rank: int, store: Path, seen: mmap.mmap, room: int | None, spoil: bool) -> None:
    """Never returns. ``seen``: what main thread and writer of every rank do, two bytes a rank."""
    with (folder.parent / f"rank{rank}.log").open("a") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    torch.set_num_threads(1)
    code = 1
    try:
        _watched(seen, rank)
        if room is not None:
            _fill(room)
        if spoil:  # the twin of every comparison: a resume that forgets the random numbers
            rng.restore = lambda saved: None
        limit = timedelta(seconds=60)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS, timeout=limit)
        reason = train(folder, plan, rank)
        dist.barrier()
        code = 0 if reason == "steps" else 128 + signal.SIGTERM
    except BaseException:
        traceback.print_exc()
    os._exit(code)


def _watched(seen: mmap.mmap, rank: int) -> None:
    """Note what is being done, in the main thread and in the one that writes."""
    main = (
        (checkpoint, "sound", "reads"), (checkpoint, "load", "reads"), (loop.Trainer, "_update", "trains"),
        (saving, "_copied", "copies"), (loop.Trainer, "_export", "exports"),
    )  # fmt: skip
    writer = ((storage, "write", "writes"), (checkpoint, "_place", "names"), (checkpoint, "prune", "prunes"))
    for thread, places in enumerate((main, writer)):
        for owner, name, phase in places:
            setattr(owner, name, _noted(getattr(owner, name), seen, 2 * rank + thread, 1 + PHASES.index(phase)))


def _noted(of: Callable[..., Any], seen: mmap.mmap, at: int, number: int) -> Callable[..., Any]:
    def noted(*args: Any, **kwargs: Any) -> Any:
        seen[at], before = number, seen[at]
        try:
            return of(*args, **kwargs)
        finally:  # once it trains, it does so until it ends
            seen[at] = before or (number if PHASES[number - 1] == "trains" else 0)

    return noted


def _fill(room: int) -> None:
    """The disk takes ``room`` more bytes of checkpoints, then it is full."""
    real, left = Path.open, [room]

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            part = bytes(data)[: max(0, left[0])]
            left[0] -= len(part)
            super().write(part)
            if len(part) < len(data):
                raise OSError(errno.ENOSPC, "No space left on device")
            return len(part)

    def opened(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        mine = "w" in mode and self.parent.name.endswith(".partial")
        return Full(self, "w") if mine else real(self, mode, *args, **kwargs)

    Path.open = opened  # type: ignore[method-assign]


class Life:
    """Two ranks of a run, forked."""

    def __init__(self, folder: Path, plan: str, room: int | None = None, spoil: bool = False) -> None:
        self.seen = mmap.mmap(-1, 2 * RANKS)
        self._home = tempfile.TemporaryDirectory()
        store = Path(self._home.name) / "store"
        self.pids: list[int] = []
        for rank in range(RANKS):
            pid = os.fork()
            if pid == 0:
                _child(folder, plan, rank, store, self.seen, room, spoil)
            self.pids.append(pid)
        self.codes: dict[int, int] = {}

    def ended(self) -> bool:
        """Whether both have; an exit code of each, negative for a signal, is in ``codes`` then."""
        for pid in self.pids:
            if pid not in self.codes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        return len(self.codes) == RANKS

    def wait(self, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        """For both to end, or for something else."""
        limit = time.monotonic() + seconds
        while not self.ended() and not until() and time.monotonic() < limit:
            time.sleep(0.002)

    def signal(self, number: int, ranks: Sequence[int] = range(RANKS)) -> None:
        for rank in ranks:
            if self.pids[rank] not in self.codes:
                os.kill(self.pids[rank], number)

    def phase(self, rank: int) -> str:
        """What a rank does; what its writer does, where that does something."""
        main, writer = self.seen[2 * rank], self.seen[2 * rank + 1]
        return PHASES[(writer or main) - 1] if writer or main else "starts"

    def saves(self, rank: int) -> bool:
        """Whether a rank's writer does something."""
        return bool(self.seen[2 * rank + 1])

    def finish(self) -> None:
        self.signal(signal.SIGKILL)
        self.wait(30)
        self._home.cleanup()


# --- many ------------------------------------------------------------------------------------------------------------


def outcome(folder: Path) -> tuple[str, list[Any]]:
    """Digest of the exported weights, and every logged row without its times."""
    digest = hashlib.sha256((folder / "final" / "trainable.safetensors").read_bytes()).hexdigest()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "tokens_per_s", "learned_tokens_per_s", "images_per_s", "data_wait", "data_wait_share")
    return digest, [{k: v for k, v in row.items() if k not in timed} for row in rows]


def in_peace(home: Path, plan: str, spoil: bool = False, name: str = "peace") -> tuple[str, list[Any]]:
    """The end of a run that nothing happens to, or of the rest of one."""
    life = Life(home / name, plan, spoil=spoil)
    life.wait(300)
    assert set(life.codes.values()) == {0}, (home / "rank0.log").read_text()[-3000:]
    life.finish()
    return outcome(home / name)


def strike(folder: Path, plan: str, fault: str, chance: random.Random) -> tuple[str, bool]:
    """One life with a fault in it. Returns what it struck, and whether the run came to its end before."""
    room = chance.randrange(12_000) if fault == "full" else None
    life, victim = Life(folder, plan, room), chance.randrange(RANKS)
    if fault in ("torn", "marker"):  # two, so that one is left
        life.wait(60, lambda: len(checkpoint.complete(folder)) > 1)
    elif chance.random() < 0.5:
        life.wait(60, lambda: life.saves(victim))
    elif chance.random() < 0.7:  # else it may not have begun
        life.wait(60, lambda: life.phase(0) not in ("starts", "reads"))
    life.wait(chance.choice((0.02, 0.1, 0.5)) * chance.random())
    early = life.ended()
    phase = life.phase(victim)
    if fault == "term":
        life.signal(signal.SIGTERM)
        life.wait(60, lambda: any(code < 0 for code in life.codes.values()))
        killed = any(code < 0 for code in life.codes.values())  # before it could listen, and so nothing was lost
        assert early or killed or set(life.codes.values()) <= {0, 128 + signal.SIGTERM}, life.codes
    elif fault == "power":
        life.signal(signal.SIGKILL)
    else:
        life.signal(signal.SIGKILL, [victim])
        life.wait(chance.uniform(0, 0.05))  # then torchrun ends the others
    life.finish()
    return phase, early


def whole(folder: Path, torn: set[int]) -> list[Path]:
    """Complete checkpoints beside whose markers (by inode) we damaged nothing: such a one counts until a life looks."""
    return [p for p in checkpoint.complete(folder) if (p / checkpoint.MARKER).stat().st_ino not in torn]


def check(folder: Path, before: list[Path], torn: set[int]) -> list[Path]:
    """Every checkpoint is as it was written, and none is gone without a newer one. Returns them."""
    found = whole(folder, torn)
    for path in found:
        for name, fact in (checkpoint._manifest(path) or {"": []}).items():
            assert checkpoint._fact(path / name) == fact, f"{path / name} is not as written"
    # One that was being replaced lies aside, complete, until the next life gives it back.
    aside = [p for p in folder.glob(".step-*.old") if (p / checkpoint.MARKER).is_file()]
    assert not before or aside or (found and found[-1] >= before[-1]), (before, found)
    return found


def damage(folder: Path, fault: str, chance: random.Random, torn: set[int]) -> bool:
    """Tear a file of the newest checkpoint, or take its marker; not of the only whole one."""
    found = whole(folder, torn)
    if len(found) < 2:
        return False
    newest = found[-1]
    if fault == "marker":
        (newest / checkpoint.MARKER).unlink()
        return True
    path = chance.choice([p for p in sorted(newest.iterdir()) if p.name != checkpoint.MARKER and p.stat().st_size])
    data = bytearray(path.read_bytes())
    if chance.random() < 0.5:
        del data[chance.randrange(len(data)) :]
    else:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)
    torn.add((newest / checkpoint.MARKER).stat().st_ino)
    return True


def campaign(home: Path, count: int, seed: int = 0, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """``count`` faults; AssertionError where one of them leaves a trace. Returns what was struck how often."""
    chance, begin = random.Random(seed), time.monotonic()
    wanted = {plan: in_peace(home, plan, name=f"peace-{plan}") for plan in PLANS}
    deaths: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    runs = done = 0
    while done < count:
        plan, folder = PLANS[runs % len(PLANS)], home / f"run{runs}"
        runs += 1
        found: list[Path] = []
        torn: set[int] = set()
        limit = min(count, done + PER_RUN)
        while done < limit:
            fault = chance.choice(FAULTS)
            phase, early = strike(folder, plan, fault, chance)
            found = check(folder, found, torn)
            if early or (folder / "final").exists():
                break
            if fault in ("torn", "marker"):
                fault = fault if damage(folder, fault, chance, torn) else "kill"
                found = [] if fault != "kill" else found
            done += 1
            deaths[phase] += 1
            kinds[fault] += 1
            newest = found[-1].name if found else "-"
            say(f"{done:4d} {plan} {fault:6s} while it {phase:8s} {newest} {time.monotonic() - begin:6.1f} s")
        assert in_peace(home, plan, name=folder.name) == wanted[plan], f"{folder} ended otherwise"
        say(f"{folder.name}: as a run left in peace, bit for bit")
    return {"runs": runs, "kinds": dict(kinds), "phases": dict(deaths), "seconds": time.monotonic() - begin}


def main() -> None:
    """Strike ``--count`` times and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = campaign(Path(folder), args.count, args.seed, lambda text: print(text, file=sys.stderr, flush=True))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
