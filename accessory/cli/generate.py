"""``python -m accessory generate --model DIR --prompt TEXT``: pictures of prompts, as PNG files with a manifest."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accessory.diffusion.sampler import SamplerSettings
    from accessory.models.generator import Generator

MANIFEST = "manifest.jsonl"
PICTURES = "pictures"
OUT = f"where pictures go; none there is replaced (default: {PICTURES}, or {PICTURES}-2 and so on where it has some)"
SOLVERS = ("euler", "midpoint", "heun", "heun3", "rk4", "dopri5", "dopri8", "sde", "ancestral")


def add_parser(sub: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the verb."""
    p = sub.add_parser("generate", help="make pictures of prompts")
    p.add_argument("--model", required=True, metavar="DIR", help="a generator folder, or the name of a shipped one")
    p.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="what to show (repeatable)")
    p.add_argument("--prompts", type=Path, metavar="FILE", help="more prompts, one a line")
    p.add_argument("--negative", metavar="TEXT", help="what to lead away from")
    p.add_argument("--size", metavar="N|WxH", help="pixels (default: the generator's own)")
    p.add_argument("--aspect", metavar="W:H", help="width to height; --size N is the side of a square of equal area")
    p.add_argument("--seed", type=int, default=0, help="of the first picture of each prompt (default: 0)")
    p.add_argument("--count", type=int, default=1, metavar="N", help="pictures of each prompt, seeds rising")
    add_sampler_options(p)
    p.add_argument("--out", type=Path, metavar="DIR", help=OUT)
    p.add_argument(
        "--skip-existing", action="store_true",
        help="go on: leave pictures that are in DIR already (default: the last folder that has some)",
    )  # fmt: skip
    p.add_argument("--batch", type=int, default=4, metavar="N", help="pictures made at once (default: 4)")
    p.add_argument("--device", metavar="cpu|cuda|cuda:N", help="where to compute (default: cuda where there is one)")
    p.add_argument("--quantize", metavar="KIND", help="keep the language model that reads prompts in int8, int4 or nf4")
    p.add_argument("--threads", type=int, help="CPU threads")
    p.add_argument("--cache", type=Path, help="asset cache")
    p.set_defaults(main=main)


def add_sampler_options(p: argparse._ActionsContainer) -> None:
    """The options that :func:`adjusted` reads."""
    own = "(default: the generator's own, which its config.yaml names and a run prints)"
    p.add_argument("--steps", type=int, metavar="N", help=f"steps of the solver {own}")
    p.add_argument("--guidance", type=float, metavar="S", help=f"how strongly to follow the prompt; 1 is off {own}")
    p.add_argument("--solver", choices=SOLVERS, help=own)
    p.add_argument("--time-shift", type=float, metavar="S", help=f"above 1: more steps near the noise {own}")


def picture_folder(out: Path | None, *, resume: bool = False) -> Path:
    """Where pictures go: ``out`` if it is given, otherwise the first of ``pictures``, ``pictures-2``, ... that holds
    none, or to ``resume`` the last that holds some. Nothing in a folder is ever replaced."""
    if out is not None:
        return out
    used = 0
    while any(_numbered(used + 1).glob("*.png")):
        used += 1
    return _numbered(used if used and resume else used + 1)


def _numbered(n: int) -> Path:
    return Path(PICTURES if n == 1 else f"{PICTURES}-{n}")


def described(settings: SamplerSettings) -> str:
    """Steps, solver and guidance in words."""
    words = [getattr(settings.solver, name, "") for name in ("kind", "name", "method")]
    solver = " ".join(w for w in words if w not in ("", "ode")) or "the default solver"
    return f"{settings.steps} steps of {solver}, guidance {settings.scale:g}" + (
        " (off)" if settings.scale == 1 else ""
    )


@dataclass(frozen=True)
class Job:
    """One picture to be made."""

    file: str
    prompt: str
    seed: int


def main(args: argparse.Namespace) -> int:
    """Make the pictures. 0 when all are there, 130 after Ctrl-C (what was made is kept).

    Raises:
        ValueError: for options that cannot be, before any picture is made; AssetError for a missing asset.
    """
    import torch

    from accessory.cli.chat import quantization
    from accessory.models.generator import digest, find_generator, for_inference, load_generator, shrink
    from accessory.parallel.groups import choose_device

    for name in ("count", "batch", "steps", "threads"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name} {value} must be at least 1")
    if not 0 <= args.seed <= 2**63 - args.count:
        raise ValueError(f"--seed {args.seed} must lie between 0 and 2^63, with room for --count {args.count}")
    prompts, device, folder = _prompts(args), choose_device(args.device), find_generator(args.model)
    args.out = picture_folder(args.out, resume=args.skip_existing)
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=args.out):
        pass  # a folder that cannot be written to is found out before a model is loaded and a picture made
    if args.threads:
        torch.set_num_threads(args.threads)
    bits, model = quantization(args), load_generator(folder, cache=args.cache)
    if bits is not None:
        shrink(model, bits)
        print(f"{args.quantize}: the language model; bridge, denoiser and codec stay as they are", file=sys.stderr)
    model = for_inference(model, device)
    size = _size(args, model.size, model.grain)
    model.check_size(size)
    settings = adjusted(model.settings, args)
    if args.negative is not None and settings.scale == 1:
        raise ValueError("--negative acts through guidance, and --guidance is 1 (off)")
    _tell_cuts([*prompts, *([args.negative] if args.negative else [])], model)
    jobs = [
        Job(f"{i:05d}-{seed}.png", prompt, seed)
        for i, prompt in enumerate(prompts)
        for seed in range(args.seed, args.seed + args.count)
    ]
    from accessory.config import plain

    about = {
        "negative": args.negative, "width": size[0], "height": size[1], "settings": plain(settings),
        "model": digest(folder), **({} if bits is None else {"quantize": args.quantize}),
    }  # fmt: skip
    out = Output(args.out, about, {"steps": settings.steps, "guidance": settings.scale}, args.skip_existing)
    todo = [job for job in jobs if out.wants(job)]
    left = len(jobs) - len(todo)
    print(f"{folder}: {size[0]}x{size[1]} pixels, {described(settings)}", flush=True)
    try:
        _make(model, todo, out, args, settings)
    except (KeyboardInterrupt, OSError):
        print(f"stopped: {out.written} of {len(todo)} pictures in {args.out}; --skip-existing goes on", file=sys.stderr)
        raise
    print(f"{len(todo)} pictures in {args.out}" + (f", {left} were there" if left else ""))
    return 0


def adjusted(settings: SamplerSettings, args: argparse.Namespace) -> SamplerSettings:
    """The generator's own settings with what the command line says otherwise."""
    from accessory.diffusion.guidance import Guidance
    from accessory.diffusion.sampler import Ancestral, Ode, Scheduled
    from accessory.diffusion.solvers import Sde

    if args.solver in ("sde", "ancestral"):
        settings = replace(settings, solver=Sde() if args.solver == "sde" else Ancestral())
    elif args.solver is not None:
        own = settings.solver if isinstance(settings.solver, Ode) else Ode()
        settings = replace(settings, solver=replace(own, method=args.solver))
    grid = settings.grid
    if args.steps is not None:
        # Solvers of an equation go from point to point, schedulers take a step at each.
        points = args.steps if isinstance(settings.solver, Ancestral | Scheduled) else args.steps + 1
        grid = replace(grid, points=points)
    if args.time_shift is not None:
        grid = replace(grid, shift=args.time_shift)
    if args.guidance is not None:
        settings = replace(settings, guidance=replace(settings.guidance or Guidance(), scale=args.guidance))
    return replace(settings, grid=grid)


def _prompts(args: argparse.Namespace) -> list[str]:
    prompts = list(args.prompt)
    if args.prompts is not None:
        try:
            lines = args.prompts.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"--prompts {args.prompts} is not UTF-8: {error}") from None
        except FileNotFoundError:
            raise ValueError(f"--prompts {args.prompts}: there is no such file; one prompt a line is wanted") from None
        except OSError as error:
            raise ValueError(f"--prompts {args.prompts} cannot be read: {error.strerror}") from None
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise ValueError(f"--prompts {args.prompts} holds no prompt: one a line is wanted")
        prompts += found
    if not prompts:
        raise ValueError("there is nothing to show: give --prompt TEXT or --prompts FILE")
    if bad := [p for p in prompts if not p.isprintable() and any("\ud800" <= c <= "\udfff" for c in p)]:
        raise ValueError(f"the prompt {bad[0][:60]!r} is not text in UTF-8")
    return prompts


def _size(args: argparse.Namespace, default: tuple[int, int], grain: tuple[int, int]) -> tuple[int, int]:
    """Width and height in pixels."""
    said = re.fullmatch(r"(\d+)(?:x(\d+))?", args.size) if args.size is not None else None
    if args.size is not None and said is None:
        raise ValueError(f"--size {args.size!r} is neither N nor WxH, in pixels")
    width, height = default if said is None else (int(said[1]), int(said[2] or said[1]))
    if args.aspect is None:
        return width, height
    ratio = re.fullmatch(r"(\d+):(\d+)", args.aspect)
    if ratio is None or not int(ratio[1]) or not int(ratio[2]):
        raise ValueError(f"--aspect {args.aspect!r} is not W:H, 16:9 for instance")
    if said is not None and said[2]:
        raise ValueError(f"--aspect {args.aspect} and --size {args.size} both say the shape; use --size N")
    root = math.sqrt(int(ratio[1]) / int(ratio[2]))
    return tuple(max(g, round(side / g) * g) for side, g in zip((width * root, height / root), grain))  # type: ignore[return-value]


def _tell_cuts(prompts: Sequence[str], model: Generator) -> None:
    for prompt, lost in dict(zip(prompts, model.lost(prompts), strict=True)).items():
        if lost:
            print(f"warning: the last {lost} tokens do not fit and are left out of {prompt[:60]!r}...", file=sys.stderr)


def whole_entries(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a JSONL file that grows, none where there is no file; a line that a kill has torn is cut off."""
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} is not JSON: {error}") from None


class Output:
    """The folder of pictures; ``about`` is what all of them share in the manifest, ``short`` what of it is said once
    more by a name of its own."""

    def __init__(self, folder: Path, about: dict[str, Any], short: dict[str, Any], skip: bool) -> None:
        self.folder, self.about, self.short, self.skip, self.written = folder, about, short, skip, 0
        self.manifest = folder / MANIFEST
        self.made = {entry["file"]: entry for entry in whole_entries(self.manifest)}

    def wants(self, job: Job) -> bool:
        """Whether a picture is to be made.

        Raises:
            ValueError: when there is one already and none is to be skipped, or when it shows something else.
        """
        path, entry = self.folder / job.file, self.made.get(job.file)
        if not path.exists():
            return True
        if not self.skip:
            raise ValueError(f"{path} exists; --skip-existing leaves what is there, --out takes another folder")
        if entry is None:
            return True  # a kill came between the picture and its line
        now = {"prompt": job.prompt, "seed": job.seed, **self.about}
        if other := [name for name, value in now.items() if entry.get(name) != value]:
            raise ValueError(
                f"{path} was made with another {', '.join(other)}: {', '.join(repr(entry.get(n)) for n in other)}; "
                "--out takes another folder"
            )
        return False

    def write(self, job: Job, picture: Any, seconds: float) -> None:
        """A picture, then its line; each is there whole or not at all."""
        path = self.folder / job.file
        private = path.with_suffix(".tmp")
        try:
            picture.save(private, "PNG")
            private.replace(path)
        finally:
            private.unlink(missing_ok=True)
        said = {"file": job.file, "prompt": job.prompt, "seed": job.seed}
        entry = {**said, **self.short, **self.about, "seconds": round(seconds, 3)}
        with self.manifest.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self.written += 1


def _make(
    model: Generator, jobs: Sequence[Job], out: Output, args: argparse.Namespace, settings: SamplerSettings
) -> None:
    from tqdm import tqdm

    size = (out.about["width"], out.about["height"])
    negative = None if args.negative is None else [args.negative]
    with tqdm(total=len(jobs), unit="picture", disable=None) as bar:
        for start in range(0, len(jobs), args.batch):
            batch, begun = jobs[start : start + args.batch], time.perf_counter()
            try:
                pictures = model.generate(
                    [job.prompt for job in batch],
                    negative=negative,
                    sizes=[size] * len(batch),
                    seeds=[job.seed for job in batch],
                    settings=settings,
                    on_step=lambda event: bar.set_postfix_str(f"step {event.step} of {event.steps or '?'}"),
                )
            except RuntimeError as error:  # torch has no type of its own for this on a CPU
                if "memory" not in str(error):
                    raise
                many = f"{len(batch)} pictures of {size[0]}x{size[1]}"
                raise ValueError(f"there is no memory for {many}; lower --batch or --size") from error
            seconds = (time.perf_counter() - begun) / len(batch)
            for job, picture in zip(batch, pictures, strict=True):
                out.write(job, picture, seconds)
            bar.update(len(batch))
