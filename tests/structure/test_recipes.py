"""Every published recipe: its numbers are those of the paper or script, its model has the parameters that it should."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from math import ceil
from pathlib import Path

import pytest

from accessory import config as configuration
from accessory.__main__ import main
from accessory.data.sources import FileConfig, load_sources, read_configs
from accessory.data.template import TEMPLATES
from accessory.models.skeleton import resolved, skeleton
from accessory.train import outline
from accessory.train.outline import Outline
from accessory.train.run import RunConfig
from accessory.vision import presets
from tests.structure import recipes
from tests.structure.recipes import RECIPES, S7, S13, S65, Recipe
from tests.structure.source import ROOT

FILES = {path.stem: path for path in sorted((ROOT / "exps").glob("*/*.yaml"))}
DATA = sorted((ROOT / "data_configs" / "public").glob("*.yaml"))


@pytest.fixture(scope="module", autouse=True)
def shared_towers() -> Iterator[None]:
    """Encoders are built once: nothing changes them, and they take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(presets, "build", functools.cache(presets.build))
        yield


@functools.cache
def load(name: str) -> RunConfig:
    return configuration.load(FILES[name], RunConfig)


@functools.cache
def described(name: str) -> Outline:
    return outline.outline(load(name), FILES[name].parent)


def test_every_recipe_is_in_the_table() -> None:
    assert set(FILES) == set(RECIPES)
    assert len(FILES) >= 50
    assert len({load(name).train.output_dir for name in FILES}) == len(FILES)


def test_the_formulas_give_what_is_published() -> None:
    """Numbers that papers, released files and their sizes state, from the formulas that the table is made of."""
    assert S13.total == 13_015_864_320
    assert S7.prefix(30) == 1_229_760  # LLaMA-Adapter V1: 1.2 M
    assert S7.lora() == 39_976_960
    assert S7.biases(all_of_them=False) == 1_097_728
    assert S7.norms() == 266_240
    assert 2 * S7.biases() == 2_719_744  # biases and scales
    assert recipes.resampler(4096, 10, 8) - recipes.resampler(4096, 10, 0) == 56_702_976
    assert recipes.joint(5120, 768, 5632) - 5120 + S13.total + 3_413_555_329 == 16_462_228_609  # SPHINX
    assert round(RECIPES["adapter_v2_finetune"].own / 1e5 + RECIPES["adapter_v2_pretrain"].own / 1e5) == 631
    assert round(sum(vars(RECIPES["sphinx_x_tiny"])[k] for k in ("own", "rest")) / 1e8) == 31
    assert S65.total == 65_285_660_672
    assert recipes.CLIP_H == 632_076_800
    assert round(recipes.bind(4096) / 1e6) == 608


@pytest.mark.parametrize("name", FILES)
def test_the_schedule_is_the_published_one(name: str) -> None:
    wanted, config = RECIPES[name], load(name)
    train = config.train
    assert train.global_batch == wanted.batch
    assert train.max_steps == ceil(wanted.rows * wanted.epochs / wanted.batch)
    assert train.warmup_steps == round(wanted.rows * wanted.warm / wanted.batch)
    assert (train.lr, train.min_lr) == pytest.approx((wanted.lr, wanted.low))
    assert (train.weight_decay, train.clip_norm, train.betas) == (wanted.decay, wanted.clip, (0.9, 0.95))
    assert resolved(config.model).max_length == wanted.length
    assert resolved(config.model).template in TEMPLATES
    assert wanted.batch % train.batch_size == 0
    assert train.output_dir == f"runs/{name}"


@pytest.mark.parametrize("name", FILES)
def test_the_model_has_its_parameters(name: str) -> None:
    wanted, found = RECIPES[name], described(name)
    assert sum(trained for _, trained in found.parts.values()) == wanted.own
    assert sum(total for total, _ in found.parts.values()) == wanted.own + wanted.rest
    assert found.memory >= 16 * wanted.own
    if name in recipes.POSITIONS:
        assert tuple(found.positions.values()) == recipes.POSITIONS[name]


@pytest.mark.parametrize("name", FILES)
def test_its_data_and_its_start_are_known(name: str) -> None:
    config, path = load(name), FILES[name]
    sources = described(name).sources
    assert all(isinstance(s, FileConfig) and s.get for s in sources)
    if RECIPES[name].whole:
        assert round(1000 * sum(s.weight for s in sources)) == RECIPES[name].rows
    for start in (config.init, config.model.base):
        run = None if start is None else re.fullmatch(r"runs/(\w+)/final", start)
        assert start is None or start.startswith("weights/") or (run is not None and run[1] in FILES)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    said, seen = text, [path]  # the source is cited here, or in the file that this one stands on
    while (above := re.search(r"^base: (\S+)$", said, re.M)) and not re.search(r"arXiv|LLaMA2-Accessory|docs/", said):
        seen.append(seen[-1].parent / above[1])
        said = seen[-1].read_text(encoding="utf-8")
    assert re.search(r"arXiv|LLaMA2-Accessory|docs/", said)


def test_skeletons_hold_no_numbers() -> None:
    net = skeleton(load("sphinx_x_moe").model)
    assert all(p.is_meta for p in net.parameters())
    assert net.backbone.config.moe is not None


def test_domains_have_their_shares() -> None:
    """Of SPHINX-X, as its paper counts them; a comment opens each."""
    path = ROOT / "data_configs" / "public" / "sphinx_x.yaml"
    parts = re.split(r"^  # (.+), [\d.]+ [Mk]$", path.read_text(encoding="utf-8"), flags=re.M)
    found = {n: sum(map(float, re.findall(r"weight: ([\d.]+)", p))) for n, p in zip(parts[1::2], parts[2::2])}
    assert found == recipes.DOMAINS
    assert sum(found.values()) == 15_290


@pytest.mark.parametrize("path", DATA, ids=lambda p: p.stem)
def test_data_configurations_name_their_files(path: Path) -> None:
    found, mistakes = read_configs(path)
    assert mistakes == []
    names = [source.name for _, source in found]
    assert all(names)
    assert len(set(names)) == len(names)
    for _, source in found:
        assert isinstance(source, FileConfig)
        assert Path(source.path).resolve().is_relative_to(ROOT / "data")
        assert source.root is None or Path(source.root).resolve().is_relative_to(ROOT / "data")
    assert any(path.name in file.read_text(encoding="utf-8") for file in FILES.values())


def test_a_missing_file_says_where_it_comes_from() -> None:
    path = ROOT / "data_configs" / "public" / "alpaca_llava.yaml"
    if (ROOT / "data").exists():
        pytest.skip("there is data here")
    with pytest.raises(ValueError, match="cannot be used") as caught:
        load_sources(path)
    said = str(caught.value)
    assert "no data file at" in said
    assert "data/gpt4_llm/alpaca_gpt4_data.json; put it there, it comes from: alpaca_gpt4_data.json of the" in said
    assert "no folder of pictures (root) at" in said


def test_the_outline_of_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    name = "exps/sphinx/sphinx_x_moe.yaml"
    assert main(["train", str(ROOT / name), "--outline", "train.lr=1e-5"]) == 0
    said = capsys.readouterr().out
    assert "| all | 48,699,860,864 | 46,721,691,648 |" in said
    assert "a picture takes: square 1295, 2:1 779" in said
    assert "learning rate: 0 to 1e-05 over 597 updates" in said
    assert "data: 34 sources, 0 of them there" in said or (ROOT / "data").exists()
    assert main(["train", str(ROOT / name), "--outline", "model.max_length=1200"]) == 2
    assert "a picture alone takes 1295 positions" in capsys.readouterr().err
    assert main(["train", str(ROOT / "exps/nano_dit.yaml"), "--outline"]) == 2
    assert "trains a generator" in capsys.readouterr().err


def test_a_wrong_number_is_seen() -> None:
    """The table is compared, not copied: another rank of LoRA has other parameters."""
    config = configuration.load(FILES["alpaca_lora"], RunConfig, ["model.tuning.0.rank=8"])
    found = outline.outline(config, FILES["alpaca_lora"].parent)
    wanted: Recipe = RECIPES["alpaca_lora"]
    assert sum(trained for _, trained in found.parts.values()) == wanted.own - S7.lora() // 2
