"""LLaMA-Adapter's own releases: one file of tensors beside LLaMA's weights, read as a checkpoint of LLaMA2-Accessory's
``llama_adapter``, which is the same network under other names.

What a file must hold is :func:`accessory.models.published_keys.release`: every tensor of the list and nothing else. A
training checkpoint that was never cut down may hold LLaMA's tensors and CLIP's too; they are taken as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accessory import config as configuration
from accessory.backbone.keys import check_keys
from accessory.backbone.llama import LlamaConfig
from accessory.backbone.meta import read_shard
from accessory.backbone.reference_folders import arguments, llama_type
from accessory.backbone.store import atomic_folder, read_file
from accessory.backbone.weights import read_folder
from accessory.models import published_keys
from accessory.models.build import CONFIG_FILE, WEIGHTS_FILE, ModelConfig, base_folder, beside, is_generator
from accessory.models.encoder_store import file_digest
from accessory.models.published import RELEASES, Adapter, LlamaType, find_type
from accessory.models.published_keys import Tuned
from accessory.models.reference import Published, read_published
from accessory.models.stacked import over
from accessory.parallel.axes import merge_shards
from accessory.peft.attach import LINEARS, LoraSpec, PrefixSpec
from accessory.peft.prefix import Gate

_SAID = {"w_bias", "w_lora", "lora_rank", "w_new_gate"}
"""What a file says of itself beside its tensors."""
_LOW = re.compile(r"(?P<at>layers\.\d+\.\w+)\.lora_(?P<name>w[qkvo123])_l(?P<half>[12])\.weight")
_FLAT = re.compile(r"(?P<at>layers\.\d+\.\w+\.w[qkvo123])_(?P<part>bias|scale)")
_GATE = re.compile(r"layers\.(?P<layer>\d+)\.attention\.(?:cap_)?(?P<new>new_)?gate")
_INPUT = ".input_scale"
_KEPT = re.compile(r"layers\.\d+\.(\w+\.w[qo123]\.bias|(attention|ffn)_norm\.weight)|norm\.weight")


@dataclass(frozen=True)
class Found:
    """Tensors of a release by their names there, merged, what it says of itself, and CLIP's where a file brings it."""

    state: dict[str, Tensor]
    said: dict[str, Any] = field(default_factory=dict)
    clip: dict[str, Tensor] = field(default_factory=dict)


def is_release(folders: Sequence[Path], kind: str | None) -> bool:
    """Whether a base with what lies over it is LLaMA-Adapter's: by name, by a file, or by lacking a ``meta.json``."""
    if kind is not None:
        return kind in RELEASES
    return any(p.is_file() for p in folders[1:]) or (len(folders) > 1 and not any(map(llama_type, folders)))


def read_release(
    base: Path, over: Sequence[Path], kind: str | None = None, *, gate: Gate | None = None, pickles: bool = False
) -> Published:
    """LLaMA's folder (any layout) with a release over it: files, folders of tensor-parallel shards, a file of CLIP.

    ``kind`` None tells it by its names (:data:`accessory.models.published.RELEASES`). ``gate``: what the prefixes'
    gates go through, in place of what the published code runs the file with.

    Raises:
        ValueError: for files that are no release, keys that are missing, unexpected or of another shape (all named),
            and a model that sees without the encoder it sees with.
    """
    found = read_files(over, pickles=pickles)
    config, tensors = read_folder(base, pickles=pickles)
    return lay_over(config, tensors, found, kind, gate, where=" + ".join(map(str, over)))


def read_files(paths: Sequence[Path], *, pickles: bool = False) -> Found:
    """What the files of a release hold; a folder is its shards in the order of the numbers in their names.

    Raises:
        ValueError: for a folder without files, files that are refused, shards that do not join.
    """
    out = Found({})
    for path in map(Path, paths):
        shards = [read_shard(file, pickles=pickles) for file in _shards(path)]
        out.said.update(shards[0][1].get("config") or {})
        named = [{spelled(k): v for k, v in state.items()} for state, _ in shards]
        for key, value in merge_shards(named, str(path)).items():
            inner = key.removeprefix("clip.")
            if inner != key or key.startswith("visual.") or _CLIP_TEXT.match(key):
                out.clip[inner] = value
            elif not key.endswith(("rope.freqs", "freqs_cis")):
                out.state[key] = value
    return replace(out, clip={k: v for k, v in out.clip.items() if k.startswith("visual.")})


_CLIP_TEXT = re.compile(
    r"transformer\.resblocks\.|token_embedding\.|(positional_embedding|text_projection|logit_scale)$|ln_final\.|"
    r"(input_resolution|context_length|vocab_size)$"
)
"""Of a whole CLIP: its text half, which is not read, and what OpenAI's files say of it."""


def _shards(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    files = sorted(p for p in path.glob("*") if p.suffix in (".pth", ".safetensors")) if path.is_dir() else []
    if not files:
        raise ValueError(f"{path} is neither a file nor a folder of .pth or .safetensors files")
    return sorted(files, key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)])


def spelled(key: str) -> str:
    """The name of a parameter of chat65b by which tensor parallelism knows how it is cut; others stay."""
    match = _FLAT.fullmatch(key)
    return key if match is None else f"{match['at']}{_INPUT if match['part'] == 'scale' else '.bias'}"


def detect(state: Mapping[str, Tensor]) -> str:
    """Which release has such names; ValueError where none has."""
    for kind, row in RELEASES.items():
        form = row.adapter
        assert form is not None
        sees = "visual_query.weight" in state or "image_bind_proj.weight" in state
        if f"{form.tokens}.weight" in state and form.layers and sees == (row.tower is not None):
            return kind
        if form.scaled and any(k.endswith(_INPUT) for k in state):
            return kind
    shown = ", ".join(list(state)[:5]) or "nothing"
    raise ValueError(f"no release of LLaMA-Adapter ({', '.join(RELEASES)}) has such names: {shown}")


def lay_over(
    config: LlamaConfig,
    base: Mapping[str, Tensor],
    found: Found,
    kind: str | None = None,
    gate: Gate | None = None,
    where: str = "the release",
) -> Published:
    """A release over a LLaMA in memory. Raises as :func:`read_release`."""
    kind = detect(found.state) if kind is None else kind
    row = find_type(kind)
    form = row.adapter
    if form is None:
        raise ValueError(f"{kind} is no release of LLaMA-Adapter; those are {', '.join(RELEASES)}")
    tuned = _tuned(form, found, where)
    wanted = published_keys.release(kind, config, tuned)
    places = {spelled(k): k for k in wanted}
    state, own = dict[str, Tensor](), dict[str, Tensor]()
    for key, value in found.state.items():
        plain = key.removeprefix("llama.") if form.wrapped else key
        if key not in places and plain in base:
            own[plain] = value  # of a checkpoint that was never cut down
        else:
            state[places.get(key, key)] = _per_head(key, value, config.n_heads)
    check_keys(wanted, state, where)
    check_keys({k: tuple(base[k].shape) for k in own}, own, where)
    if row.tower is not None and not found.clip:
        raise ValueError(f"a {kind} sees with {row.tower}, whose weights {where} does not bring: lay its file over too")
    whole = {**base, **own}
    merged = _scaled(whole, state) if form.scaled else whole | _renamed(form, state, config)
    merged |= {f"clip.{k}": v for k, v in found.clip.items()} if row.tower is not None else {}
    published = read_published(merged, {**arguments(config), **_arguments(form, tuned)}, kind)
    if gate is None:
        return published
    return replace(
        published,
        specs=tuple(replace(s, gate=gate) if isinstance(s, PrefixSpec) else s for s in published.specs),
    )


def _tuned(form: Adapter, found: Found, where: str) -> Tuned:
    """What a file says that it tunes, or shows by any of its names."""
    state, said = found.state, found.said
    if unknown := sorted(set(said) - _SAID):
        raise ValueError(f"{where}: config has entries that are not understood: {', '.join(unknown)}")
    if not form.tuned:
        return Tuned()
    low = [v.shape[0] for k, v in state.items() if re.search(r"\.lora_w[qkvo123]_l1\.weight$", k)]
    rank = int(said.get("lora_rank", low[0] if low else 16)) if said.get("w_lora", bool(low)) else 0
    bias = bool(said.get("w_bias", any(re.search(r"\.w[qo123]\.bias$", k) for k in state)))
    # whoever tuned biases tuned the norms too
    norm = bias or any(k.endswith(("attention_norm.weight", "ffn_norm.weight", "llama.norm.weight")) for k in state)
    if form.bind is not None and (norm or rank):  # fine-tuned: all three, or none
        bias, norm, rank = True, True, rank or 16
    new_gate = rank > 0 if form.new_gate else any(k.endswith(".new_gate") for k in state)
    return Tuned(bias, norm, rank, bool(said.get("w_new_gate", new_gate)), "image_bind_norm_1.bias" in state)


def _arguments(form: Adapter, tuned: Tuned) -> dict[str, Any]:
    """``config.json`` of the same model in LLaMA2-Accessory."""
    if form.scaled:
        return {"bias_tuning": True, "norm_tuning": True, "lora_rank": -1}
    return {
        "prefix_layers": form.layers,
        "prefix_len": form.length,
        "use_prefix_new_gate": tuned.new_gate,
        "lora_rank": tuned.rank or -1,
        "bias_tuning": tuned.bias,
        "norm_tuning": tuned.norm,
        "trainable_mode": "mm_stage1" if form.blocks or form.bind else "sg",
    }


def _per_head(key: str, value: Tensor, heads: int) -> Tensor:
    """A gate of one number, as the first files had it, is that of every head."""
    match = _GATE.fullmatch(key.removeprefix("llama."))
    if match is None or match["new"] or value.numel() != 1:
        return value
    return value.reshape(1, 1, 1, 1).expand(1, heads, 1, 1)


def _renamed(form: Adapter, state: Mapping[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    """The names of a ``llama_adapter``. Gates of blocks without a prefix, which the files hold too, go."""
    out: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, Tensor]] = {}
    for key, value in state.items():
        key = key.removeprefix("llama.")
        if key == f"{form.tokens}.weight":
            out["prefix"] = value.reshape(form.layers, 1, form.length, config.dim)
        elif gate := _GATE.fullmatch(key):
            stacks.setdefault(f"prefix_{gate['new'] or ''}gate", {})[int(gate["layer"])] = value
        elif low := _LOW.fullmatch(key):
            out[f"{low['at']}.{low['name']}.lora_{'ab'[int(low['half']) - 1]}.weight"] = value
        else:
            out[key] = value
    for name, gates in stacks.items():
        kept = [gates[i].flatten() for i in range(config.n_layers - form.layers, config.n_layers)]
        out[name] = torch.stack(kept) if name == "prefix_gate" else torch.cat(kept)
    return out


def _scaled(base: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """chat65b computes ``W (s x) + b``: the scale of an input is one of the weight's columns, and goes into them."""
    out = dict(base)
    for key, value in state.items():
        flat = _FLAT.fullmatch(key)
        if flat is None:
            out[key] = value
        elif flat["part"] == "bias":
            out[f"{flat['at']}.bias"] = value
        else:
            weight = base[f"{flat['at']}.weight"]
            out[f"{flat['at']}.weight"] = (weight.float() * value.float()).to(weight.dtype)
    return out


def released(kind: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a release by their names there, of those of a model folder; gates of blocks without a prefix are
    zero.

    Raises:
        ValueError: for another kind, for chat65b, whose scales are in the weights, and for tensors it has no place for.
    """
    form = find_type(kind).adapter
    if form is None or form.scaled:
        raise ValueError(f"{kind} is not written as a file of LLaMA-Adapter")
    llama = "llama." if form.wrapped else ""
    prefixes: dict[str, dict[int, Tensor]] = {"tokens": {}, "gate": {}, "new_gate": {}}
    out: dict[str, Tensor] = {}
    for full, value in state.items():
        name = full.removeprefix("backbone.")
        if found := re.fullmatch(r"layers\.(\d+)\.attention\.prefix\.(\w+)", name):
            prefixes[found[2]][int(found[1])] = value
        elif low := re.fullmatch(r"(layers\.\d+\.\w+)\.(w[qkvo123])\.delta\.([ab])\.weight", name):
            out[f"{llama}{low[1]}.lora_{low[2]}_l{'ab'.index(low[3]) + 1}.weight"] = value
        elif full.startswith("resampler."):
            out[full.removeprefix("resampler.")] = value
        elif _KEPT.fullmatch(name):
            out[llama + name] = value
        else:
            raise ValueError(f"{full} has no place in a file of LLaMA-Adapter")
    tokens = prefixes.pop("tokens")
    out[f"{form.tokens}.weight"] = torch.cat([tokens[i] for i in sorted(tokens)])
    for part, gates in prefixes.items():
        for i in range(max(tokens) + 1 if gates else 0):
            gate = gates[i] if i in gates else torch.zeros_like(gates[max(gates)])
            out[f"{llama}layers.{i}.attention.{form.gate if part == 'gate' else part}"] = gate.reshape(1, -1, 1, 1)
    return out


def write_release(source: Path, folder: Path) -> str:
    """Write what a model folder, with the bases it stands on, adds to LLaMA as LLaMA-Adapter's file of its form,
    ``folder/KIND.pth``; returns KIND.

    Raises:
        ValueError: where no release has such prefixes and such a resampler, with what does not fit; for a generator,
            and for a base that is not the one that was trained on.
    """
    if is_generator(source):
        raise ValueError(f"{source} is a generator, which has no prefixes")
    config, state = _stacked(Path(source))
    kind = _form_of(config, state)
    form = find_type(kind).adapter
    made = {k: v.clone() for k, v in released(kind, state).items()}  # not the whole file
    low = next((v.shape[0] for k, v in made.items() if k.endswith("_l1.weight")), 0)
    said = {"w_bias": any(k.endswith(".wq.bias") for k in made), "w_lora": bool(low), "lora_rank": low or 16}
    with atomic_folder(folder) as private:
        torch.save(
            {"model": made, "config": said} if form is not None and form.wrapped else made, private / f"{kind}.pth"
        )
    return kind


def _stacked(source: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Configuration and trained tensors of a model folder and of every base below it; the upper ones win."""
    text = (source / CONFIG_FILE).read_text(encoding="utf-8")
    config: ModelConfig = configuration.build(configuration.parse(text, str(source)), ModelConfig, str(source))
    state = read_file(source / WEIGHTS_FILE)
    if config.base is None:
        return config, state
    with beside(source):
        folder = base_folder(config.base)
    if config.base_sha256 not in (None, found := file_digest(folder / WEIGHTS_FILE)):
        raise ValueError(f"{folder} is not what {source} was trained on: SHA-256 {found}, not {config.base_sha256}")
    below, under = _stacked(folder)
    if all(any(isinstance(s, LoraSpec) for s in c.tuning) for c in (below, config)):
        raise ValueError(f"{source} has LoRA over that of its base {folder}; a file of LLaMA-Adapter holds one")
    return replace(over(config, below), tuning=(*below.tuning, *config.tuning)), under | state


def _form_of(config: ModelConfig, state: Mapping[str, Tensor]) -> str:
    """The release that computes what this configuration does with these trained tensors."""
    prefix = next((s for s in config.tuning if isinstance(s, PrefixSpec)), None)
    low = next((s for s in config.tuning if isinstance(s, LoraSpec)), None)
    if prefix is None or config.projector is not None:
        raise ValueError(
            "a file of LLaMA-Adapter is of prefixes alone: this model has none, or a projector beside them"
        )
    if low is not None and (not prefix.plain or low.alpha is not None or set(low.targets) != set(LINEARS)):
        raise ValueError(f"LLaMA-Adapter's LoRA has no alpha, all linears and plain prefixes; this is {low}, {prefix}")
    amiss = {
        kind: _misfits(row, row.adapter, config, prefix, state)
        for kind, row in RELEASES.items()
        if row.adapter is not None and not row.adapter.scaled
    }
    nearest = min(amiss, key=lambda kind: len(amiss[kind]))
    if amiss[nearest]:
        raise ValueError(
            f"no release of LLaMA-Adapter has the form of this model; the nearest, {nearest}, differs in: "
            + "; ".join(amiss[nearest])
        )
    return nearest


def _misfits(
    row: LlamaType, form: Adapter, config: ModelConfig, prefix: PrefixSpec, state: Mapping[str, Tensor]
) -> list[str]:
    """What of a model the file of a release cannot say, or its readers compute otherwise."""
    wanted = PrefixSpec(form.length, form.layers, prefix.gate, prefix.new_gate, prefix.plain, prefix.init_std)
    tower = None if config.tower is None else config.tower.preset
    sees = config.resampler
    blocks = None if sees is None else (sees.kind, sees.width, sees.depth)
    there = ("queries", *form.blocks) if form.blocks else ("bind", *form.bind) if form.bind else None
    more = [k for k in state if ".delta." in k or ".new_gate" in k or _KEPT.fullmatch(k.removeprefix("backbone."))]
    checks = (
        (prefix == wanted, f"{prefix}, and not {wanted}"),  # in all else that a prefix may have too
        ((prefix.gate == "raw") == form.raw, f"prefix gate {prefix.gate}, and not {'raw' if form.raw else 'tanh'}"),
        (tower == row.tower, f"tower {tower}, and not {row.tower}"),
        (blocks == there, f"resampler {blocks}, and not {there}"),
        # which the file does not say
        (not form.blocks or sees is None or sees.heads == 16, f"resampler.heads {sees and sees.heads}, and not 16"),
        (form.tuned or not more, f"trained beside the prefixes: {', '.join(more[:3])}"),
    )
    return [said for fits, said in checks if not fits]
