"""Stand-ins for SLURM's commands, on one machine whose every "node" is localhost: sbatch, srun, scancel and scontrol.

Called as ``python -m tests.slurm COMMAND ARGUMENTS``; what they share lies in the folder that ``SLURM_STAND_IN`` names.
What differs from SLURM: sbatch stays until the job has ended for good, and the time is nearly over when there is a file
``limit`` in that folder.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

SHARED = Path(os.environ.get("SLURM_STAND_IN", "."))
SWITCHES = ("--requeue", "--exclusive")
JOB = "4711"


def install(folder: Path) -> dict[str, str]:
    """Executables in ``folder``/bin, and the environment in which they are found."""
    (folder / "bin").mkdir(exist_ok=True)
    for name in ("sbatch", "srun", "scancel", "scontrol"):
        path = folder / "bin" / name
        path.write_text(f'#!/bin/sh\nPYTHONPATH={Path.cwd()} exec "{sys.executable}" -m tests.slurm {name} "$@"\n')
        path.chmod(0o755)
    return {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "SLURM_STAND_IN": str(folder)}


def split(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """Options, and what follows them."""
    options, words = {}, list(words)
    while words and words[0].startswith("--"):
        name, _, value = words.pop(0).partition("=")
        options[name] = value if value or name in SWITCHES else words.pop(0)
    return options, words


def sbatch(words: list[str]) -> int:
    """Run a copy of a script, tell it before the time is over, and again as often as it is requeued."""
    given, (script, *rest) = split(words)
    lines = [line for line in Path(script).read_text().splitlines() if line.startswith("#SBATCH ")]
    options = {**split([w for line in lines for w in shlex.split(line)[1:]])[0], **given}
    spooled = Path(shutil.copy(script, SHARED / "slurm_script"))
    env = {
        **os.environ, "SLURM_JOB_ID": JOB, "SLURM_SUBMIT_DIR": os.getcwd(), "MAY_REQUEUE": str("--requeue" in options),
        "SLURM_JOB_NUM_NODES": options["--nodes"], "SLURM_JOB_NODELIST": f"node[1-{options['--nodes']}]",
    }  # fmt: skip
    whom, _, early = options.get("--signal", "").partition("@")
    attempt = 0
    while True:
        append = attempt and options.get("--open-mode") == "append"
        with (SHARED / "slurm.log").open("a" if append else "w") as log:
            job = subprocess.Popen(["bash", spooled, *rest], env=env, stdout=log, stderr=log, start_new_session=True)
            while job.poll() is None:
                if (SHARED / "limit").exists() and whom == "B:TERM" and int(early) > 0:
                    (SHARED / "limit").unlink()
                    job.terminate()
                time.sleep(0.05)
        if not (SHARED / "requeue").exists():
            return job.returncode
        (SHARED / "requeue").unlink()
        attempt += 1
        env["SLURM_RESTART_COUNT"] = str(attempt)


def srun(words: list[str]) -> int:
    """One task a node. A task that fails ends the others, and a SIGTERM to srun itself ends all of them at once."""
    options, command = split(words)
    tasks = []
    for node in range(int(os.environ["SLURM_JOB_NUM_NODES"])):
        env = {**os.environ, "SLURM_PROCID": str(node), "SLURM_NODEID": str(node)}
        tasks.append(subprocess.Popen(command, env=env, start_new_session=True))
    (SHARED / "step").write_text(" ".join(str(t.pid) for t in tasks))
    signal.signal(signal.SIGTERM, lambda *_: reach(signal.SIGKILL))
    bad = False
    while any(t.poll() is None for t in tasks):
        if not bad and options.get("--kill-on-bad-exit") == "1" and any(t.returncode for t in tasks):
            bad = True
            reach(signal.SIGTERM)
        time.sleep(0.05)
    (SHARED / "step").unlink()
    return max(128 - t.returncode if t.returncode < 0 else t.returncode for t in tasks)


def reach(number: int) -> None:
    """A signal to every process of the tasks, as a container of processes has it."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = {int(pid) for pid in (SHARED / "step").read_text().split()}
    size = 0
    while len(found) > size:
        size = len(found)
        found |= {pid for pid, parent in parents.items() if parent in found}
    for pid in found & parents.keys():
        os.kill(pid, number)


def scancel(words: list[str]) -> int:
    """``--signal=TERM JOB``: to the steps of the job, not to its shell."""
    options, rest = split(words)
    assert (options, rest) == ({"--signal": "TERM"}, [JOB]), words
    if not (SHARED / "step").exists():
        return 1
    reach(signal.SIGTERM)
    return 0


def scontrol(words: list[str]) -> int:
    """``show hostnames LIST`` and ``requeue JOB``, which a job must have allowed."""
    if words[:2] == ["show", "hostnames"]:
        count = int(words[2].removeprefix("node[1-").removesuffix("]"))
        print("\n".join(["localhost"] * count))
        return 0
    assert words == ["requeue", JOB], words
    if os.environ["MAY_REQUEUE"] != "True":
        print("Requested operation is presently disabled", file=sys.stderr)
        return 1
    (SHARED / "requeue").touch()
    return 0


if __name__ == "__main__":
    verb = {"sbatch": sbatch, "srun": srun, "scancel": scancel, "scontrol": scontrol}[sys.argv[1]]
    raise SystemExit(verb(sys.argv[2:]))
