"""LLaMA-Adapter's own files: their full published lists on `meta`, and what small ones say once they are converted."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.__main__ import main
from accessory.backbone.llama import Llama, LlamaConfig
from accessory.backbone.meta import save_shards
from accessory.backbone.sizes import SIZES
from accessory.backbone.weights import save_accessory
from accessory.models import build, published_keys
from accessory.models.adapter_release import Found, lay_over, read_files, read_release, spelled
from accessory.models.published import RELEASES
from accessory.models.published_keys import Tuned, on_meta, release
from accessory.models.reference import assemble
from accessory.models.reference_folder import convert_pictured
from accessory.nn.attention import Attention
from accessory.nn.norm import RMSNorm
from accessory.nn.rope import rotate, table
from accessory.parallel.axes import split_shards
from accessory.peft.attach import merge
from accessory.vision import presets
from accessory.vision.resampler import Bind, Neighbours
from accessory.vision.towers import TowerConfig
from tests.tiny import tiny_tokenizer
from tools.presets import RELEASED
from tools.presets import main as print_presets

CLIP = {"embed_dim": 12, "vision_cfg": {"layers": 1, "width": 24, "head_width": 8, "patch_size": 8, "mlp_ratio": 2.0}}
SMALL = LlamaConfig(dim=32, n_layers=3, n_heads=4, vocab_size=360, multiple_of=16, max_length=300)
FULL = Tuned(bias=True, norm=True, rank=2, new_gate=True)
FORMS = {
    "adapter_v1": Tuned(),
    "adapter_v1_caption": Tuned(),
    "adapter_v2": FULL,
    "adapter_v2_chat65b": Tuned(),
    "imagebind_llm": replace(FULL, new_gate=False),
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The releases with two of three blocks adapted, narrow visual blocks, and a CLIP of 17 tokens."""
    options = {"config": CLIP, "activation": "quick_gelu", "projected": True}
    for name in ("clip-l-projected", "clip-h-projected"):
        monkeypatch.setitem(presets.PRESETS, name, TowerConfig("open_clip", "tiny", 32, options))
    for kind, row in RELEASES.items():
        form = row.adapter
        assert form is not None
        form = replace(
            form,
            layers=min(form.layers, 3 if kind == "imagebind_llm" else 2),
            length=min(form.length, 4),
            features=12,
            blocks=(32, form.blocks[1] // 2 or 1) if form.blocks else None,
            bind=(48, 2) if form.bind else None,
        )
        monkeypatch.setitem(RELEASES, kind, replace(row, adapter=form, image_size=32))


def filled(shapes: published_keys.Shapes, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(s, generator=generator) * (0.5 if "gate" in k else 0.2) for k, s in shapes.items()}


def clip(seed: int = 2) -> dict[str, Tensor]:
    """A file of CLIP: the half that sees, and something of the other."""
    state = presets.build("clip-l-projected").get_submodule("model").state_dict()
    state = filled({f"visual.{k}": tuple(v.shape) for k, v in state.items()}, seed)
    return state | {"logit_scale": torch.zeros(()), "transformer.resblocks.0.ln_1.weight": torch.ones(24)}


def parts(kind: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """LLaMA and the release's tensors."""
    torch.manual_seed(0)
    base = {k: v.detach() for k, v in Llama(SMALL).state_dict().items()}
    return base, filled(release(kind, SMALL, FORMS[kind]))


def laid(kind: str, change: Callable[[dict[str, Tensor]], object] | None = None, gate: Any = None) -> build.MLLM:
    """The network of a release, after a change to its file."""
    base, state = parts(kind)
    if change is not None:
        change(state)
    sees = {k.removeprefix("clip."): v for k, v in clip().items() if k.startswith("visual.")}
    state = {spelled(k): v for k, v in state.items()}  # as reading leaves it
    published = lay_over(SMALL, base, Found(state, {}, sees if RELEASES[kind].tower else {}), kind, gate)
    tower = presets.build("clip-l-projected") if RELEASES[kind].tower else None
    return assemble(published, tower)


@torch.no_grad()
def scores(net: build.MLLM) -> Tensor:
    ids = torch.tensor([[1, 7, 20, 33, 5, 9]])
    tiles = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(4)) if net.tower is not None else None
    context = None
    if tiles is not None:
        assert net.tower is not None
        assert net.resampler is not None
        context = net.resampler(net.tower(tiles).sequence())
    return net.logits(net(ids, context=context))


# --- the published lists ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(RELEASES))
@pytest.mark.parametrize("name", ["plain", "tuned"])
def test_the_full_list_is_read_at_full_size(kind: str, name: str) -> None:
    """Every tensor of the published list finds its place in the model of the published size, and nothing is left."""
    row = RELEASES[kind]
    assert row.adapter is not None
    config = SIZES[row.size]
    tuned = Tuned()
    if name == "tuned":
        tuned = Tuned(True, True, 16, new_gate=row.adapter.new_gate) if row.adapter.tuned else tuned
    shapes = release(kind, config, tuned)
    base = on_meta({k: tuple(v.shape) for k, v in build_meta(config).items()}, torch.float16)
    state = on_meta(shapes, torch.float32)
    found = Found({spelled(k): v for k, v in state.items()})
    if row.tower is not None:
        with torch.device("meta"):
            sees = presets.build(row.tower)
        found = replace(found, clip={f"visual.{k}": v for k, v in sees.get_submodule("model").state_dict().items()})
    published = lay_over(config, base, found, kind)
    with torch.device("meta"):
        net = assemble(published, presets.build(row.tower) if row.tower else None)
    added = sum(p.numel() for k, p in net.named_parameters() if not k.startswith("tower."))
    added -= sum(v.numel() for v in base.values())
    # what the file has and the model does not: gates of blocks without a prefix; norms, which replace LLaMA's
    lost = (config.n_layers - row.adapter.layers) * (config.n_heads + tuned.new_gate) if row.adapter.layers else 0
    lost += sum(torch.Size(s).numel() for k, s in shapes.items() if re.search(r"(n_|\.|^)norm\.weight$", k))
    lost += sum(torch.Size(s).numel() for k, s in shapes.items() if k.endswith("_scale"))
    assert added == published_keys.count(shapes) - lost


def build_meta(config: LlamaConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        return dict(Llama(config).state_dict())


def test_the_counts_are_the_published_ones(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert print_presets(["adapter_v1", "adapter_v2", "imagebind_llm"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"adapter_v1 .*llama-7b .* 33 +1,229,824", said)
    assert re.search(r"adapter_v2 .*BIAS-7B.* 363 +63,095,552", said)
    # and it can fail
    monkeypatch.setitem(RELEASED["adapter_v1"][0].parts, "adapter_query", 1)
    assert print_presets(["adapter_v1"]) == 1
    assert "adapter_query" in capsys.readouterr().out


# --- strictness ------------------------------------------------------------------------------------------------------


def spoilt(kind: str) -> list[tuple[Callable[[dict[str, Tensor]], object], str]]:
    """A tensor less, one more, one of another shape, of every kind of tensor that the file has."""
    _, state = parts(kind)
    kinds = {re.sub(r"\d+", "N", k): k for k in state}
    out: list[tuple[Callable[[dict[str, Tensor]], object], str]] = [
        (lambda s: s.update({"llama.layers.0.attention.odd": torch.ones(1)}), "attention.odd")
    ]
    for key in kinds.values():
        out.append((lambda s, key=key: s.pop(key), key))  # type: ignore[misc]
        out.append((lambda s, key=key: s.update({key: s[key][..., :-1].clone()}), key))  # type: ignore[misc]
    return out


@pytest.mark.parametrize("kind", list(RELEASES))
def test_a_missing_an_odd_and_a_mis_shaped_key_are_named(kind: str, small: None) -> None:
    for change, key in spoilt(kind):
        with pytest.raises(ValueError, match=re.escape(key)):
            laid(kind, change)


def test_what_is_no_release_is_said(small: None, tmp_path: Path) -> None:
    base, state = parts("adapter_v2")
    with pytest.raises(ValueError, match=r"has such names: a\.b"):
        lay_over(SMALL, base, Found({"a.b": torch.ones(1)}))
    with pytest.raises(ValueError, match="llama is no release"):
        lay_over(SMALL, base, Found(state), "llama")
    with pytest.raises(ValueError, match=r"sees with clip-l-projected, whose weights .* does not bring"):
        lay_over(SMALL, base, Found(state))
    with pytest.raises(ValueError, match="config has entries that are not understood: phase"):
        lay_over(SMALL, base, Found(state, {"phase": 1}), "adapter_v2")
    with pytest.raises(ValueError, match=r"45 missing: llama\.layers\.0\.attention\.new_gate"):
        lay_over(SMALL, base, Found(filled(release("adapter_v2", SMALL)), {"w_lora": True, "lora_rank": 2}))
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        read_files([tmp_path / "none.pth"])


def test_code_in_a_pickle_is_refused(small: None, tmp_path: Path) -> None:
    _, state = parts("adapter_v1")
    torch.save(state, tmp_path / "good.pth")
    torch.save({"model": state, "args": argparse.Namespace(lr=1)}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="is a pickle; convert it first"):
        read_files([tmp_path / "good.pth"])
    assert len(read_files([tmp_path / "good.pth"], pickles=True).state) == len(state)
    with pytest.raises(ValueError, match="is refused: it holds more than tensors"):
        read_files([tmp_path / "bad.pth"], pickles=True)


# --- what the numbers do ---------------------------------------------------------------------------------------------


class Plain:
    """LLaMA-Adapter by its formulas, straight from the tensors of a file; nothing of this project's slots."""

    def __init__(self, base: dict[str, Tensor], state: dict[str, Tensor], kind: str, raw: bool = False) -> None:
        form = RELEASES[kind].adapter
        assert form is not None
        self.form, self.raw = form, raw
        self.w = base | {k.removeprefix("llama."): v for k, v in state.items()}

    def linear(self, x: Tensor, at: str, name: str) -> Tensor:
        w, key = self.w, f"{at}.{name}"
        y = F.linear(x * w.get(f"{key}_scale", torch.ones(1)), w[f"{key}.weight"])
        y = y + w.get(f"{key}.bias", w.get(f"{key}_bias", torch.zeros(1)))
        low = f"{at}.lora_{name}_l"
        if f"{low}1.weight" in w:
            y = y + F.linear(F.linear(x, w[f"{low}1.weight"]), w[f"{low}2.weight"])
        return y

    def attention(self, x: Tensor, i: int, seen: Tensor | float) -> Tensor:
        w, at, t = self.w, f"layers.{i}.attention", x.shape[1]

        def split(y: Tensor) -> Tensor:
            return y.view(1, -1, SMALL.n_heads, SMALL.head_width)

        q, k, v = (split(self.linear(x, at, n)) for n in ("wq", "wk", "wv"))
        turn = table(torch.arange(t)[None], SMALL.head_width, SMALL.rope_theta)
        q, k, v = rotate(q, turn).transpose(1, 2), rotate(k, turn).transpose(1, 2), v.transpose(1, 2)
        scores = q @ k.transpose(2, 3) / SMALL.head_width**0.5
        scores = scores + torch.full((t, t), float("-inf")).triu(1)
        y = scores.softmax(-1) @ v
        first = SMALL.n_layers - self.form.layers
        if self.form.layers and i >= first:
            tokens = w[f"{self.form.tokens}.weight"].view(self.form.layers, 1, self.form.length, -1)[i - first] + seen
            # of the weights alone: neither LoRA nor a bias
            k, v = (split(F.linear(tokens, w[f"{at}.{n}.weight"])).transpose(1, 2) for n in ("wk", "wv"))
            gate = w[f"{at}.{self.form.gate}"]
            gate = (gate if self.raw else gate.tanh()) * w.get(f"{at}.new_gate", torch.ones(1))
            y = y + gate * ((q @ k.transpose(2, 3) / SMALL.head_width**0.5).softmax(-1) @ v)
        return self.linear(y.transpose(1, 2).flatten(2), at, "wo")

    def __call__(self, seen: Tensor | float) -> Tensor:
        w = self.w
        x = w["tok_embeddings.weight"][torch.tensor([[1, 7, 20, 33, 5, 9]])]

        def norm(x: Tensor, name: str) -> Tensor:
            return F.rms_norm(x, (SMALL.dim,), w[f"{name}.weight"], SMALL.norm_eps)

        for i in range(SMALL.n_layers):
            x = x + self.attention(norm(x, f"layers.{i}.attention_norm"), i, seen)
            y, at = norm(x, f"layers.{i}.ffn_norm"), f"layers.{i}.feed_forward"
            x = x + self.linear(F.silu(self.linear(y, at, "w1")) * self.linear(y, at, "w3"), at, "w2")
        return F.linear(norm(x, "norm"), w["output.weight"])


@pytest.mark.parametrize("kind", list(RELEASES))
@torch.no_grad()
def test_logits_are_those_of_the_formulas(kind: str, small: None) -> None:
    base, state = parts(kind)
    net = laid(kind)
    seen: Tensor | float = 0.0
    if net.resampler is not None:
        assert net.tower is not None
        tiles = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(4))
        seen = net.resampler(net.tower(tiles).sequence())
        assert seen.abs().max() > 0.1
    form = RELEASES[kind].adapter
    assert form is not None
    expected = Plain(base, state, kind, form.raw)(seen)
    torch.testing.assert_close(scores(net), expected, rtol=1e-4, atol=1e-4)
    if form.layers:  # and the gate's function matters, and can be chosen
        other = laid(kind, gate="tanh" if form.raw else "raw")
        assert (scores(other) - expected).abs().max() > 1e-3
        torch.testing.assert_close(scores(other), Plain(base, state, kind, not form.raw)(seen), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", list(RELEASES))
def test_every_kind_of_tensor_matters(kind: str, small: None) -> None:
    """One tensor spoilt, other logits; but for gates of blocks without a prefix, which go."""
    before = scores(laid(kind))
    _, state = parts(kind)
    form = RELEASES[kind].adapter
    assert form is not None
    for key in {re.sub(r"\d+", "N", k): k for k in state}.values():  # the last of a kind
        other = filled({key: tuple(state[key].shape)}, seed=9)
        assert (scores(laid(kind, lambda s, other=other: s.update(other))) - before).abs().max() > 1e-6, key  # type: ignore[misc]
    idle = [k for k in state if re.search(r"layers\.0\.attention\.(cap_|new_)?gate", k) and form.layers < 3]
    for key in idle:
        assert torch.equal(scores(laid(kind, lambda s, key=key: s.update({key: s[key] + 1}))), before)  # type: ignore[misc]


def test_one_gate_for_all_heads_is_read(small: None) -> None:
    """The first files of V1 have one number a block."""
    base, state = parts("adapter_v1")
    alone = {k: v[:, :1, 0, 0].flatten() if k.endswith("gate") else v for k, v in state.items()}
    spread = {k: v[:, :1].expand_as(v) if k.endswith("gate") else v for k, v in state.items()}
    ours, theirs = (assemble(lay_over(SMALL, base, Found(s)), None) for s in (alone, spread))
    torch.testing.assert_close(scores(ours), scores(theirs))
    assert (scores(ours) - scores(laid("adapter_v1"))).abs().max() > 1e-3


def test_lora_under_a_plain_prefix_is_kept_beside(small: None) -> None:
    """Folding it into wk and wv would move the prefix: they stay as they are, all else is folded."""
    net = laid("adapter_v2")
    before = scores(net)
    merge(net)
    torch.testing.assert_close(scores(net), before, rtol=1e-4, atol=1e-4)
    attention = net.backbone.get_submodule("layers.2.attention")
    assert isinstance(attention, Attention)
    assert attention.wk.delta is not None
    assert attention.wq.delta is None
    assert attention.prefix is not None
    attention.prefix.plain = False  # and it matters which way the tokens go
    assert (scores(net) - before).abs().max() > 1e-3


# --- files and folders -----------------------------------------------------------------------------------------------


def base_folder(path: Path, ranks: int = 0) -> Path:
    base, _ = parts("adapter_v1")
    if ranks:
        save_shards(SMALL, base, path, ranks)
    else:
        save_accessory(SMALL, base, path)
    tiny_tokenizer(path)
    return path


@pytest.mark.parametrize("kind", ["adapter_v1", "adapter_v1_caption", "adapter_v2", "imagebind_llm"])
def test_a_file_goes_in_and_comes_out(
    kind: str, small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The verb makes a model folder that says what the file says, and the same file again of it."""
    monkeypatch.setenv("ACCESSORY_CACHE", str(tmp_path / "cache"))
    form = RELEASES[kind].adapter
    assert form is not None
    _, state = parts(kind)
    said = {"w_bias": True, "w_lora": True, "lora_rank": 2}
    torch.save({"model": state, "config": said} if form.tuned else state, tmp_path / "release.pth")
    torch.save(clip(), tmp_path / "clip.pt")
    over = [str(tmp_path / n) for n in ("release.pth", "clip.pt")[: 2 if RELEASES[kind].tower else 1]]
    source = base_folder(tmp_path / "llama")
    assert main(["convert", str(source), str(tmp_path / "out"), "--to", "model", "--overlay", *over]) == 0
    made = build.load(tmp_path / "out")
    torch.testing.assert_close(scores(made.net), scores(laid(kind)), rtol=1e-5, atol=1e-5)
    assert (made.config.tower is None) == (RELEASES[kind].tower is None)
    assert main(["convert", str(tmp_path / "out"), str(tmp_path / "back"), "--to", "reference"]) == 0
    assert f"{kind}.pth" in capsys.readouterr().out
    again = read_files([tmp_path / "back" / f"{kind}.pth"], pickles=True)
    assert again.said == (said if form.tuned else {})
    assert set(again.state) == set(state)
    for key, value in state.items():
        if re.search(r"layers\.0\.attention\.(cap_|new_)?gate", key) and form.layers < 3:
            assert not again.state[key].any()
        else:
            assert torch.equal(again.state[key], value), key


def test_chat65b_is_joined_from_its_ranks(small: None, tmp_path: Path) -> None:
    """Shards of the chat model over shards of LLaMA: biases and scales are cut where their linear is."""
    base, state = parts("adapter_v2_chat65b")
    source = base_folder(tmp_path / "llama", ranks=2)
    folder = tmp_path / "chat"
    folder.mkdir()
    for rank, shard in enumerate(split_shards({spelled(k): v for k, v in state.items()}, 2)):
        own = {re.sub(r"\.input_scale$", "_scale", re.sub(r"\.bias$", "_bias", k)): v for k, v in shard.items()}
        assert own["layers.0.attention.wq_scale"].shape == (32,)
        assert own["layers.0.attention.wo_scale"].shape == (16,)
        torch.save({k: v.clone() for k, v in own.items()}, folder / f"rank{rank}.pth")
    config = convert_pictured([source, folder], tmp_path / "out", pickles=True)
    assert config.tower is None
    made = build.load(tmp_path / "out")
    with torch.no_grad():
        expected = Plain(base, state, "adapter_v2_chat65b")(0.0)
    torch.testing.assert_close(scores(made.net), expected, rtol=1e-4, atol=1e-4)
    torch.save({**torch.load(folder / "rank1.pth"), "norm.weight": torch.zeros(32)}, folder / "rank1.pth")
    with pytest.raises(ValueError, match=r"norm\.weight \(differs between shards"):
        read_release(source, [folder], pickles=True)


def test_a_checkpoint_that_was_not_cut_down_is_read(small: None) -> None:
    """LLaMA's own tensors beside the adapter's take the place of the base's."""
    base, state = parts("adapter_v1")
    moved = {k: v + 0.1 for k, v in base.items()}
    whole = assemble(lay_over(SMALL, base, Found({**moved, **state})), None)
    apart = assemble(lay_over(SMALL, moved, Found(state)), None)
    assert torch.equal(scores(whole), scores(apart))
    assert (scores(whole) - scores(laid("adapter_v1"))).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"1 mis-shaped: layers\.1\.attention\.wo\.weight"):
        lay_over(SMALL, base, Found({**moved, **state, "layers.1.attention.wo.weight": torch.ones(3)}))


# --- ImageBind-LLM's network and cache -------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True])
@torch.no_grad()
def test_the_bind_network_by_its_formula(legacy: bool) -> None:
    torch.manual_seed(0)
    bind = Bind(6, 8, width=20, depth=2, legacy=legacy)
    shapes = published_keys._bind(8, 6, 20, 2, legacy)
    w = filled(shapes)
    bind.load_state_dict(w, strict=True)
    features = torch.randn(3, 5, 6)
    x = F.linear(features[:, 0] / features[:, 0].norm(dim=-1, keepdim=True), *_pair(w, "image_bind_proj"))
    for i in (1, 2):
        norm, bias = _pair(w, f"image_bind_norm_{i}")
        y = F.layer_norm(x, (8,), norm, bias) if legacy else x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * norm
        hidden = F.silu(F.linear(y, *_pair(w, f"image_bind_f1_{i}"))) * F.linear(y, *_pair(w, f"image_bind_f3_{i}"))
        x = x + F.linear(hidden, *_pair(w, f"image_bind_f2_{i}"))
    torch.testing.assert_close(bind(features)[:, 0], x, rtol=1e-5, atol=1e-5)
    assert not isinstance(bind.get_submodule("image_bind_norm_1"), RMSNorm) or not legacy


def _pair(w: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor | None]:
    return w[f"{name}.weight"], w.get(f"{name}.bias")


def test_the_cache_moves_a_vector_towards_its_neighbours(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    known = F.normalize(torch.randn(40, 6, generator=generator), dim=-1)
    x = F.normalize(torch.randn(2, 6, generator=generator), dim=-1)
    cache = Neighbours(known * 3, count=4)  # any length
    moved = cache(x)
    for row, out in zip(x, moved, strict=True):
        near = (known @ row).argsort(descending=True)[:4]
        weights = (20 * known[near] @ row).exp()
        mean = (weights[:, None] * known[near]).sum(0)
        torch.testing.assert_close(out, F.normalize(row + mean / mean.norm(), dim=-1))
    assert (moved - x).abs().max() > 0.05
    assert not cache.state_dict()  # it belongs to no checkpoint
    bind = Bind(6, 8, width=20, depth=1)
    before = bind(x[:, None])
    bind.near = cache
    assert (bind(x[:, None]) - before).abs().max() > 1e-4
    with pytest.raises(ValueError, match=r"the cache has shape \(40, 6\), expected \(N, C\) with N at least 41"):
        Neighbours(known, count=41)
    with pytest.raises(ValueError, match="vectors have width 5, those of the cache 6"):
        cache(torch.ones(1, 5))
