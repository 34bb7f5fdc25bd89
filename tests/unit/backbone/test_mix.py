"""Mixing weights: formulas, ends, streaming, provenance, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from accessory.backbone import mix as mixing
from accessory.backbone import store
from accessory.backbone.mix import Recipe, difference, ends, mix, part_of
from accessory.backbone.reference_folders import overlay
from accessory.backbone.stream import Weights, read_header
from accessory.backbone.weights import load_backbone, save_accessory
from tests.tiny import tiny_model_dir
from tests.tiny_backbone import TINY, logits, model
from tools.mix_weights import main

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def parents(tmp_path: Path) -> list[Path]:
    """Three backbones of one size."""
    out = []
    for i in range(3):
        torch.manual_seed(i)
        save_accessory(TINY, model().state_dict(), tmp_path / f"p{i}")
        out.append(tmp_path / f"p{i}")
    return out


def states(folders: list[Path]) -> list[dict[str, Tensor]]:
    return [store.read_tensors(f) for f in folders]


def near(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=1e-6) for k in a)


@pytest.mark.parametrize("chunk", [7, 1000, 10**6])
def test_linear_and_task(parents: list[Path], tmp_path: Path, chunk: int) -> None:
    a, b, c = states(parents)
    mix(parents, tmp_path / "soup", Recipe("linear", (0.2, 0.3, 0.5)), chunk=chunk)
    assert near(store.read_tensors(tmp_path / "soup"), {k: 0.2 * a[k] + 0.3 * b[k] + 0.5 * c[k] for k in a})
    mix(parents, tmp_path / "task", Recipe("task", (0.7, -0.4)), chunk=chunk)
    task = {k: a[k] + 0.7 * (b[k] - a[k]) - 0.4 * (c[k] - a[k]) for k in a}
    assert near(store.read_tensors(tmp_path / "task"), task)
    assert not near(task, a)


def test_slerp_follows_the_arc(parents: list[Path], tmp_path: Path) -> None:
    a, b = states(parents[:2])
    mix(parents[:2], tmp_path / "out", Recipe("slerp", (0.25,)), chunk=100)
    out = store.read_tensors(tmp_path / "out")
    for name, x in a.items():
        x, y, z = x.flatten().double(), b[name].flatten().double(), out[name].flatten().double()
        angle = torch.acos((x @ y) / (x.norm() * y.norm()))
        expected = (torch.sin(0.75 * angle) * x + torch.sin(0.25 * angle) * y) / torch.sin(angle)
        assert torch.allclose(z, expected, atol=1e-5)
    straight = {k: 0.75 * a[k] + 0.25 * b[k] for k in a}
    assert not near(out, straight)


def test_slerp_of_one_direction_is_straight() -> None:
    x = torch.ones(5)
    assert mixing.arc(iter([x]), iter([2 * x]), 0.3) == pytest.approx((0.7, 0.3))
    assert mixing.arc(iter([x]), iter([0 * x]), 0.3) == pytest.approx((0.7, 0.3))


@pytest.mark.parametrize("method", ["linear", "slerp", "task"])
def test_both_ends_are_the_parents_to_the_bit(parents: list[Path], tmp_path: Path, method: str) -> None:
    middle = {"linear": Recipe("linear", (0.5, 0.5)), "slerp": Recipe("slerp", (0.5,)), "task": Recipe("task", (0.5,))}
    for i, recipe in ends(middle[method], 2):
        mix(parents[:2], tmp_path / str(i), recipe)
        assert torch.equal(logits(load_backbone(tmp_path / str(i))), logits(load_backbone(parents[i])))
    mix(parents[:2], tmp_path / "middle", middle[method])
    assert not torch.allclose(logits(load_backbone(tmp_path / "middle")), logits(load_backbone(parents[0])), atol=1e-2)


def test_low_precision_is_rounded_once(tmp_path: Path) -> None:
    for i in range(2):
        torch.manual_seed(i)
        half = {k: v.bfloat16() for k, v in model().state_dict().items()}
        save_accessory(TINY, half, tmp_path / str(i))
    mix([tmp_path / "0", tmp_path / "1"], tmp_path / "out", Recipe("linear", (0.3, 0.7)))
    a, b, out = states([tmp_path / "0", tmp_path / "1", tmp_path / "out"])
    for name, x in a.items():
        exact = 0.3 * x.double() + 0.7 * b[name].double()
        assert out[name].dtype == torch.bfloat16
        assert torch.allclose(out[name].double(), exact, rtol=2**-8 * 1.001, atol=1e-6), name


def test_shards_stay_shards(parents: list[Path], tmp_path: Path) -> None:
    for i in (0, 1):
        save_accessory(TINY, store.read_tensors(parents[i]), tmp_path / f"s{i}", max_shard_bytes=40_000)
    mix([tmp_path / "s0", tmp_path / "s1"], tmp_path / "out", Recipe("linear", (0.5, 0.5)))
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    a, b = states(parents[:2])
    assert near(store.read_tensors(tmp_path / "out"), {k: (a[k] + b[k]) / 2 for k in a})


def test_parts_have_weights_of_their_own(tmp_path: Path) -> None:
    folders = [tiny_model_dir(tmp_path / str(i), seed=i) for i in range(2)]
    (tmp_path / "tok").mkdir()
    config = (folders[0] / "config.yaml").read_text()
    (folders[1] / "config.yaml").write_text(config)
    recipe = Recipe("linear", (1.0, 0.0), {"towers": (0.0, 1.0), "*layers.1.*": (0.5, 0.5)})
    mix(folders, tmp_path / "out", recipe)
    a, b, out = (store.read_file(f / "trainable.safetensors") for f in (*folders, tmp_path / "out"))
    seen = set()
    for name in a:
        part = part_of(name)
        expected = b[name] if part == "towers" else a[name]
        if "layers.1." in name and part != "towers":
            expected, part = (a[name] + b[name]) / 2, "pattern"
        seen.add(part)
        assert torch.allclose(out[name], expected, atol=1e-6), name
    assert seen == {"towers", "projector", "backbone", "pattern"}


def test_names_of_parts() -> None:
    assert part_of("llma.clip.visual.proj") == part_of("tower.model.conv.weight") == "towers"
    assert (
        part_of("projector.linear.weight")
        == part_of("llma.visual_proj.0.weight")
        == part_of("start_img")
        == "projector"
    )
    assert part_of("backbone.layers.0.attention.wq.delta.a.weight") == "adapters"
    assert part_of("layers.0.attention.wq.lora_a.weight") == part_of("llma.prefix_gate") == "adapters"
    assert part_of("model.layers.0.self_attn.q_proj.weight") == part_of("llma.norm.weight") == "backbone"


def test_the_files_say_what_they_are(parents: list[Path], tmp_path: Path) -> None:
    mix(parents[:2], tmp_path / "out", Recipe("linear", (0.4, 0.6), {"layers.0.*": (1.0, 0.0)}))
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["mix"])
    assert facts == store.read_json(tmp_path / "out" / "mix.json")
    assert facts["weights"] == [0.4, 0.6]
    assert facts["parts"] == {"layers.0.*": [1.0, 0.0]}
    assert [p["name"] for p in facts["parents"]] == ["p0", "p1"]
    assert facts["parents"][0]["sha256"] == Weights(parents[0]).sha256()
    assert facts["parents"][0]["sha256"] != facts["parents"][1]["sha256"]


def test_what_does_not_fit_is_listed(parents: list[Path], tmp_path: Path) -> None:
    state = store.read_tensors(parents[1])
    state["norm.weight"] = torch.ones(3)
    state["extra.weight"] = state.pop("output.weight")
    (tmp_path / "bad").mkdir()
    save_file(state, tmp_path / "bad" / "model.safetensors")
    half = Recipe("linear", (0.5, 0.5))
    with pytest.raises(ValueError, match=r"1 missing: output.weight.*1 unexpected: extra.weight.*norm.weight: \(3,\)"):
        mix([parents[0], tmp_path / "bad"], tmp_path / "out", half)
    assert not (tmp_path / "out").exists()
    config = store.read_json(parents[1] / "config.json")
    config["backbone"]["rope_theta"] = 5.0
    store.write_json(parents[1] / "config.json", config)
    with pytest.raises(ValueError, match="configurations differ in backbone"):
        mix(parents[:2], tmp_path / "out", half)
    with pytest.raises(ValueError, match="part 'towers' matches no tensor"):
        mix([parents[0], parents[2]], tmp_path / "out", Recipe("linear", (0.5, 0.5), {"towers": (1.0, 0.0)}))


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (Recipe("linear", (0.5, 0.6)), "add up to 1"),
        (Recipe("linear", (1.0,)), r"takes 2 weight\(s\)"),
        (Recipe("slerp", (0.5, 0.5)), r"takes 1 weight\(s\)"),
        (Recipe("task", (float("nan"),)), "takes 1"),
        (Recipe("linear", (0.5, 0.5), {"backbone": (2.0, 1.0)}), "backbone: linear weights"),
    ],
)
def test_weights_that_do_not_suit(recipe: Recipe, words: str, parents: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        mix(parents[:2], tmp_path / "out", recipe)


def test_factors_of_lora_are_not_mixed_by_chance(tmp_path: Path) -> None:
    for i in range(2):
        (tmp_path / str(i)).mkdir()
        tensors = {"backbone.layers.0.attention.wq.delta.a.weight": torch.full((2, 3), float(i))}
        save_file(tensors, tmp_path / str(i) / "trainable.safetensors")
    both = [tmp_path / "0", tmp_path / "1"]
    with pytest.raises(ValueError, match="factors of LoRA"):
        mix(both, tmp_path / "out", Recipe("linear", (0.5, 0.5)))
    mix(both, tmp_path / "out", Recipe("linear", (0.5, 0.5), {"adapters": (0.5, 0.5)}))
    mix(both, tmp_path / "end", Recipe("linear", (0.0, 1.0)))


def test_a_torn_file_is_named(parents: list[Path], tmp_path: Path) -> None:
    file = parents[1] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="truncated"):
        mix(parents[:2], tmp_path / "out", Recipe("linear", (0.5, 0.5)))
    with pytest.raises(ValueError, match="none of them"):
        Weights(tmp_path)


def test_nothing_is_overwritten(parents: list[Path]) -> None:
    with pytest.raises(ValueError, match="not an empty folder"):
        mix(parents[:2], parents[2], Recipe("linear", (0.5, 0.5)))


def test_a_difference_laid_over_the_base_is_the_tuned_model() -> None:
    base = {"a": torch.randn(3).half(), "b": torch.randn(2)}
    tuned = {"a": torch.randn(3), "new": torch.randn(4)}
    delta = difference(tuned, base)
    assert delta.keys() == tuned.keys()
    whole = overlay(base, delta, difference=True)
    assert whole.keys() == {"a", "b", "new"}
    assert torch.allclose(whole["a"].float(), tuned["a"], atol=1e-3)
    assert torch.equal(whole["b"], base["b"])
    with pytest.raises(ValueError, match="not of the same model"):
        difference({"a": torch.zeros(2)}, {"a": torch.zeros(3)})


def peak(folders: list[Path], out: Path, method: str, weights: str) -> int:
    """Peak resident bytes of a process that mixes two folders in pieces of 100,000 elements."""
    script = (
        "import re, sys\nfrom pathlib import Path\nfrom accessory.backbone.mix import Recipe, mix\n"
        f"a, b, out = map(Path, sys.argv[1:])\nmix([a, b], out, Recipe({method!r}, {weights}), chunk=100_000)\n"
        # Not what getrusage says, which a child inherits from the process that forked it.
        "print(int(re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1]) * 1024)\n"
    )
    arguments = [sys.executable, "-c", script, *map(str, folders), str(out)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, cwd=ROOT)
    return int(done.stdout)


@pytest.mark.parametrize(("method", "weights"), [("linear", "(0.5, 0.5)"), ("slerp", "(0.5,)")])
def test_memory_does_not_grow_with_the_files(method: str, weights: str, tmp_path: Path) -> None:
    peaks = {}
    for size in (1, 160):  # MB a file, in one tensor
        for name in "ab":
            folder = tmp_path / f"{size}{name}"
            folder.mkdir()
            save_file({"layers.0.w": torch.randn(size * 250_000)}, folder / "model.safetensors")
        both = [tmp_path / f"{size}a", tmp_path / f"{size}b"]
        peaks[size] = peak(both, tmp_path / f"{size}out", method, weights)
        assert read_header(tmp_path / f"{size}out" / "model.safetensors")["layers.0.w"].count == size * 250_000
    # Three files of 160 MB went through: none of them was ever in memory.
    assert peaks[160] - peaks[1] < 16_000_000, peaks


def test_the_tool(parents: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [str(p) for p in parents]
    assert main([str(tmp_path / "a"), "--parents", *given[:2], "--alpha", "0.3", "--part", "layers.0.*=1"]) == 0
    assert "both ends give back their parents' logits" in capsys.readouterr().out
    a, b, out = states([*parents[:2], tmp_path / "a"])
    name = "layers.0.attention.wq.weight"
    assert torch.equal(out[name], b[name])
    assert torch.allclose(out["output.weight"], 0.7 * a["output.weight"] + 0.3 * b["output.weight"], atol=1e-6)
    assert main([str(tmp_path / "t"), "--parents", *given, "--method", "task", "--weights", "0.5,0.5"]) == 0
    assert main([str(tmp_path / "a"), "--parents", *given[:2], "--alpha", "0.3"]) == 1
    assert "not an empty folder" in capsys.readouterr().err
    assert main([str(tmp_path / "b"), "--parents", *given[:2], "--alpha", "0.3", "--weights", "1,0"]) == 1
    assert main([str(tmp_path / "b"), "--parents", *given[:2], "--weights", "x"]) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "p0", "p1", "p2", "t"]


def test_a_broken_mixture_is_not_kept(
    parents: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Recipe, "factors", lambda self, name: tuple(reversed(self.of(name))))
    given = [str(p) for p in parents[:2]]
    assert main([str(tmp_path / "out"), "--parents", *given, "--alpha", "0.3"]) == 1
    assert "the end of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
