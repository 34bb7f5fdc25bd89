"""The functional bugs of LLaMA2-Accessory, one test a number: this project must not have them.

The number is that of the bug in the list of the lineage's known bugs. Each test does what its user did, and says in
its name what must come of it. Numbers 3, 4 and 21 are in ``test_lineage_bugs_entries``.
"""

from __future__ import annotations

import importlib
import json
import math
import pkgutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import accessory.evaluate
from accessory import config as configuration
from accessory.backbone import store
from accessory.backbone.hf import write_hf
from accessory.backbone.llama import Llama, LlamaConfig
from accessory.backbone.reference_folders import build_language, read_reference
from accessory.backbone.weights import load_backbone, read_folder, save_accessory
from accessory.data import template
from accessory.data.encode import Encoder
from accessory.data.files import open_rows
from accessory.data.mixture import Mixture
from accessory.data.rows import RowRejected
from accessory.data.sources import FileConfig, open_source
from accessory.data.tiling import TilingConfig
from accessory.data.tokenizer import load
from accessory.models.build import ProjectorConfig
from accessory.nn.moe import MoEConfig, MoEFeedForward, routings
from accessory.nn.rope import RopeScaling
from accessory.parallel import groups
from accessory.parallel.axes import merge_shards, split_shards
from accessory.peft.attach import LoraSpec, PrefixSpec, TrainSpec, attach
from accessory.schema import Picture, Sample, Turn
from accessory.serve.sphinx import MetaModel
from accessory.tokens import IGNORE
from accessory.train.config import TrainConfig
from accessory.train.loop import TrainingDiverged, train
from accessory.train.optim import Optimizer
from accessory.vision import presets
from tests.tiny import tiny_model, tiny_tokenizer
from tests.tiny_backbone import TINY, equal, logits, model
from tests.toy import ToySource, toy_model, toy_objective

ARGS = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 16, "vocab_size": 40}
PLAIN = LlamaConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, multiple_of=16, vocab_size=40)


def dialogue(*texts: str, picture: bool = False) -> tuple[Turn, ...]:
    """Turns of user and assistant in their order, with a picture in the first where asked for."""
    turns = [Turn("assistant" if i % 2 else "user", (text,)) for i, text in enumerate(texts)]
    if picture:
        turns[0] = Turn("user", (Picture(Image.new("RGB", (20, 12), (9, 99, 200))), *turns[0].parts))
    return tuple(turns)


def encoder(tmp_path: Path, name: str = "sphinx", *, words: int = 10, limit: int = 400) -> Encoder:
    """An encoder of pictures of ``words`` positions."""
    return Encoder(load(tiny_tokenizer(tmp_path / "t")), template.get(name), TilingConfig(size=16), words, limit)


def published(folder: Path, state: dict[str, Tensor], *, diff: bool = False, config: bool = True) -> Path:
    """A folder as LLaMA2-Accessory writes it."""
    folder.mkdir()
    if config:
        (folder / "meta.json").write_text(json.dumps({"llama_type": "llama"}))
        (folder / "config.json").write_text(json.dumps(ARGS))
    name = f"consolidated.00-of-01.model{'-diff' if diff else ''}.pth"
    torch.save({"model": {f"llma.{k}": v.clone() for k, v in state.items()}}, folder / name)
    return folder


def test_bug_01_a_difference_can_be_laid_over_a_base(tmp_path: Path) -> None:
    base, tuned = dict(model(PLAIN).state_dict()), dict(model(PLAIN).state_dict())
    delta = {k: tuned[k] - base[k] for k in base}
    folders = [published(tmp_path / "base", base), published(tmp_path / "diff", delta, diff=True)]
    _, _, tensors = read_reference(folders, pickles=True)
    assert all(torch.allclose(tensors[k], tuned[k], atol=1e-6) for k in tuned)
    assert not any(torch.allclose(base[k], tuned[k], atol=1e-2) for k in tuned)
    with pytest.raises(ValueError, match="comes first"):
        read_reference(folders[1:], pickles=True)


def test_bug_02_pictures_that_leave_no_place_for_text_are_refused_by_name(tmp_path: Path) -> None:
    turns = dialogue("What is it?", "A cat.", picture=True)
    with pytest.raises(RowRejected, match=r"positions \(1455 of them pictures\), the limit is 512"):
        encoder(tmp_path, words=1455, limit=512).encode(Sample(turns))
    row = encoder(tmp_path, words=100, limit=512).encode(Sample(turns))
    assert bool((row.labels != IGNORE).any())


def test_bug_02_the_sizes_are_read_under_both_names_of_their_file(tmp_path: Path) -> None:
    state = dict(model(PLAIN).state_dict())
    folder = published(tmp_path / "a", state, config=False)
    for name in ("config.json", "params.json"):
        (folder / name).write_text(json.dumps(ARGS))
        config, tensors = read_folder(folder, pickles=True)
        assert config.dim == 64
        assert equal(tensors, state)
        (folder / name).unlink()
    with pytest.raises(ValueError, match=r"params\.json.*config\.json"):
        read_folder(folder, pickles=True)


@pytest.mark.parametrize("ends", [False, True])
def test_bug_05_as_many_positions_are_declared_as_are_taken(ends: bool, tmp_path: Path) -> None:
    made = tiny_model(tmp_path, projector=ProjectorConfig(layers="linear_norm", start_end=ends))
    assert made.net.projector is not None
    turns = dialogue("What is it?", "A cat.", picture=True)
    row, plain = made.encoder.row(turns), made.encoder.row(dialogue("What is it?", "A cat."))
    declared = made.net.projector.num_tokens + 2 * ends
    assert len(row.ids) - len(plain.ids) == int((row.ids < 0).sum()) == declared
    assert made.net(row.ids[None], row.tiles).shape[1] == len(row.ids)
    exact = Encoder(
        made.tokenizer, made.template, made.encoder.tiling, made.encoder.tokens_per_tile, len(row.ids), ends
    )
    assert torch.equal(exact.encode(Sample(turns)).ids, row.ids)
    exact.max_length -= 1
    with pytest.raises(RowRejected, match="the limit is"):
        exact.encode(Sample(turns))


@pytest.mark.parametrize(("length", "kept"), [(40, 40), (48, 48), (61, 48), (71, 48)])
def test_bug_06_a_long_prompt_keeps_its_end_and_gets_its_answer(length: int, kept: int, tmp_path: Path) -> None:
    meta = MetaModel(tiny_model(tmp_path, max_length=64))
    ids = list(range(10, 10 + length))
    row, most = meta._fit(ids, None, 16)
    assert (row.ids.tolist(), most) == (ids[-kept:], 16)
    cut, whole = meta.generate([ids[-kept:], ids], max_gen_len=16)
    assert cut == whole != ""
    with pytest.raises(ValueError, match="leave no room for an answer"):
        meta.generate([ids * 2], max_gen_len=64)


def test_bug_07_perplexity_is_the_exponential_of_the_mean(tmp_path: Path) -> None:
    meta = MetaModel(tiny_model(tmp_path))
    found = meta.evaluate_examples(["The word is moon."], ["The word"])
    (nll,), (logits,) = found["nll"], found["non_context_logits"]
    assert nll == pytest.approx(-found["log_likelihood"][0] / len(logits))
    assert found["ppl"] == pytest.approx([math.exp(nll)])
    assert found["ppl"] != pytest.approx([nll])


def test_bug_08_an_unknown_template_is_an_error() -> None:
    with pytest.raises(ValueError, match="no template 'alpacca'"):
        template.get("alpacca")


@pytest.mark.parametrize(("name", "mark"), [("rows.csv", ","), ("rows.tsv", "\t")])
def test_bug_08_tables_can_be_read(name: str, mark: str, tmp_path: Path) -> None:
    lines = [("instruction", "input", "output"), ("Say hi.", "", "Hi"), ("Name one.", "cat or ship", "cat")]
    (tmp_path / name).write_text("".join(mark.join(line) + "\n" for line in lines))
    source = open_source(FileConfig("alpaca", str(tmp_path / name)))
    assert [source[i].turns[-1].text for i in range(len(source))] == ["Hi", "cat"]


def test_bug_09_every_answer_is_labelled_where_it_stands(tmp_path: Path) -> None:
    encode = encoder(tmp_path)
    answers = ("red", "a red hat", "red", "no: a\n red ### hat")
    turns = dialogue("red?", answers[0], "a red hat", answers[1], "red", answers[2], "Again?", answers[3])
    row = encode.encode(Sample(turns))
    learned, runs = row.labels != IGNORE, list[list[int]]()
    for i, on in enumerate(learned.tolist()):
        if on:
            runs = [*runs, []] if not i or not learned[i - 1] else runs
            runs[-1].append(int(row.ids[i]))
    assert [encode.tokenizer.decode(run, glued=True) for run in runs] == [f" {a}\n###" for a in answers]
    assert torch.equal(row.labels[learned], row.ids[learned])


def test_bug_10_prefixes_go_with_shared_keys_and_a_closed_gate_changes_nothing() -> None:
    net = model(TINY)
    assert TINY.kv_heads < TINY.n_heads
    before = logits(net)
    attach(net, [PrefixSpec(length=3, layers=1)])
    assert torch.equal(logits(net), before)
    for name, p in net.named_parameters():
        if name.endswith("prefix.gate"):
            p.data.fill_(0.7)
    assert not torch.allclose(logits(net), before, atol=1e-3)
    with pytest.raises(ValueError, match="prefix length must be at least 1, got 0"):
        attach(model(TINY), [PrefixSpec(length=0)])


def test_bug_10_gates_are_cut_and_joined_with_their_heads() -> None:
    net = model(TINY)
    attach(net, [PrefixSpec(length=3)])
    state = {k: torch.randn(v.shape) for k, v in net.state_dict().items()}
    shards = split_shards(state, 2)
    name = "layers.0.attention.prefix.gate"
    assert torch.equal(shards[1][name], state[name][TINY.n_heads // 2 :])
    assert equal(merge_shards(shards), state)


def experts() -> Llama:
    return model(replace(PLAIN, ffn_dim=32, moe=MoEConfig(4, 2)))


def test_bug_11_experts_can_be_cut_for_more_ranks() -> None:
    state = dict(experts().state_dict())
    for count in (1, 2, 4):
        assert equal(merge_shards(split_shards(state, count)), state)
    assert any("experts.3" in k for k in split_shards(state, 4)[3])
    assert not any("experts.0" in k for k in split_shards(state, 4)[3])


def test_bug_11_what_one_model_routes_is_no_others() -> None:
    one, two = experts(), experts()
    layers = [m for m in one.modules() if isinstance(m, MoEFeedForward)]
    with routings(one) as first, routings(two) as second:
        logits(one)
        assert (len(first), len(second)) == (len(layers), 0)
        logits(two)
        assert (len(first), len(second)) == (len(layers), len(layers))


@pytest.mark.parametrize(
    ("kind", "sizes"), [("falcon-180b", (232, 8)), ("falcon-40b", (128, 8)), ("falcon-7b", (71, 1))]
)
def test_bug_12_falcons_have_their_published_heads(kind: str, sizes: tuple[int, int]) -> None:
    from accessory.backbone.sizes import SIZES

    config = SIZES[kind]
    assert (config.n_heads, config.kv_heads) == sizes


def test_bug_13_the_exported_configuration_is_right(tmp_path: Path) -> None:
    config = replace(TINY, rope_scaling=RopeScaling("linear", 4.0), max_length=777)
    net = model(config)
    write_hf(config, dict(net.state_dict()), tmp_path / "hf", max_shard_bytes=20_000)
    written = store.read_json(tmp_path / "hf" / "config.json")
    assert written["max_position_embeddings"] == 777
    assert 4.0 in (place.get("factor") for place in written.values() if isinstance(place, dict))
    index = store.read_json(tmp_path / "hf" / "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in net.state_dict().values())
    assert torch.allclose(logits(load_backbone(tmp_path / "hf")), logits(net), atol=1e-5)


def test_bug_14_norms_gates_and_learned_vectors_do_not_decay(tmp_path: Path) -> None:
    made = tiny_model(
        tmp_path,
        train=True,
        projector=ProjectorConfig(layers="linear_norm", start_end=True),
        tuning=(PrefixSpec(length=2, new_gate=True), TrainSpec(("projector.*", "backbone.*", "*.prefix.*"))),
    )
    optimizer = Optimizer(made.net, TrainConfig(output_dir="unused", max_steps=1, lr=0.1, weight_decay=0.5))
    still = {n for (_, _, decay), names in optimizer.groups.items() if not decay for n in names}
    named = dict(made.net.named_parameters())
    norms = {
        f"{prefix}.{n}"
        for prefix, m in made.net.named_modules()
        if "norm" in type(m).__name__.lower()
        for n, p in m.named_parameters(recurse=False)
        if p.requires_grad
    }
    gates = {n for n in named if ".prefix." in n}
    vectors = {n for n in named if n.split(".")[-1] in ("start_img", "end_img", "skip")}
    assert norms
    assert gates
    assert vectors
    assert norms | gates | vectors <= still
    assert "backbone.layers.0.attention.wq.weight" not in still


def test_bug_15_the_activation_of_clip_is_a_choice() -> None:
    config = presets.PRESETS["tiny-clip"]
    assert not hasattr(config, "members")
    outputs = []
    for activation in ("gelu", "quick_gelu"):
        torch.manual_seed(0)
        tower = presets.build(replace(config, options={**config.options, "activation": activation}))  # type: ignore
        outputs.append(tower(torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))).patches)
    assert not torch.allclose(*outputs, atol=1e-6)


def test_bug_15_pictures_of_a_batch_do_not_see_each_other() -> None:
    tower = presets.build("tiny-clip")
    tiles = torch.rand(3, 3, 32, 32)
    together = tower(tiles).patches
    alone = torch.cat([tower(t[None]).patches for t in tiles])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


def test_bug_16_a_frozen_encoder_stays_in_evaluation() -> None:
    tower = presets.build("tiny-sphinx").requires_grad_(False)
    tiles = torch.rand(2, 3, 32, 32)
    before = [t.clone() for t in tower.tokens(tiles)]
    nn.ModuleList([tower]).train()
    drops = [m for m in tower.modules() if isinstance(m, nn.Dropout) and m.p > 0]
    assert drops
    assert not any(m.training for m in drops)
    assert all(torch.equal(a, b) for a, b in zip(before, tower.tokens(tiles), strict=True))
    assert tower.requires_grad_(True).train().training  # one that learns has its dropout


def test_bug_17_every_module_of_the_evaluation_can_be_imported() -> None:
    names = [m.name for m in pkgutil.walk_packages(accessory.evaluate.__path__, "accessory.evaluate.")]
    assert len(names) > 3
    for name in names:
        if not name.endswith(".lmms"):  # it subclasses what an optional harness brings
            importlib.import_module(name)


def test_bug_18_keys_that_are_too_many_are_an_error(tmp_path: Path) -> None:
    state = dict(model(TINY).state_dict())
    save_accessory(TINY, state, tmp_path / "good")
    load_backbone(tmp_path / "good")
    from safetensors.torch import save_file

    save_file({**state, "layers.7.surprise": torch.ones(2)}, tmp_path / "good" / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 unexpected: layers\.7\.surprise"):
        load_backbone(tmp_path / "good")


def test_bug_18_an_overlay_needs_no_configuration_of_its_own(tmp_path: Path) -> None:
    state, norm = dict(model(PLAIN).state_dict()), torch.full((64,), 0.3)
    folders = [published(tmp_path / "base", state), published(tmp_path / "top", {"norm.weight": norm}, config=False)]
    built = build_language(read_reference(folders, pickles=True))
    assert torch.equal(built.norm.weight, norm)
    assert torch.equal(built.output.weight, state["output.weight"])


def test_bug_19_a_loss_that_is_no_number_stops_every_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of this rank is finite; the sum over ranks is not, because of another."""
    config = TrainConfig(output_dir=str(tmp_path), max_steps=3, lr=0.1, precision="fp32", tensorboard=False)
    plain = groups.all_reduce
    train(toy_model(), ToySource(), toy_objective, replace(config, output_dir=str(tmp_path / "fine")))
    monkeypatch.setattr(groups, "all_reduce", lambda x, *a: plain(x, *a) + float("nan"))
    with pytest.raises(TrainingDiverged, match="the loss is nan"):
        train(toy_model(), ToySource(), toy_objective, config)


def test_bug_20_a_projector_trains_whole_beside_lora(tmp_path: Path) -> None:
    tuning = (LoraSpec(rank=2), TrainSpec(("projector.*",)))
    made = tiny_model(tmp_path, train=True, tuning=tuning, projector=ProjectorConfig("linear_norm", start_end=True))
    assert made.net.projector is not None
    frozen = [n for n, p in made.net.projector.named_parameters() if not p.requires_grad]
    assert frozen == []
    assert not made.net.backbone.output.weight.requires_grad


@pytest.mark.parametrize("value", ["0.5", "2", "null"])
def test_bug_22_gradients_can_be_clipped_to_a_fraction(value: str) -> None:
    tree = configuration.parse(f"output_dir: x\nmax_steps: 1\nlr: 0.1\nclip_norm: {value}\n", "here")
    config = configuration.build(tree, TrainConfig, "here")
    assert config.clip_norm == (None if value == "null" else float(value))
    net = nn.Linear(2, 2)
    for p in net.parameters():
        p.grad = torch.full_like(p, 10.0)
    optimizer = Optimizer(net, config)
    optimizer.clip()
    norm = torch.linalg.vector_norm(torch.cat([g.flatten() for g in optimizer.gradients()]))
    assert float(norm) == pytest.approx(10 * math.sqrt(6) if value == "null" else float(value), rel=1e-4)


def test_bug_23_changed_annotations_are_seen(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    config = FileConfig("alpaca", str(path))

    def write(*answers: str) -> Mixture:
        path.write_text("".join(json.dumps({"instruction": "Say.", "output": a}) + "\n" for a in answers))
        return Mixture([open_source(config)])

    first = write("one", "two")
    assert open_rows(path)[0]["output"] == "one"
    mark = first.fingerprint()
    second = write("three", "four")
    assert open_rows(path)[0]["output"] == "three"
    assert {second.sample(k).turns[-1].text for k in range(2)} == {"three", "four"}
    assert second.fingerprint() != mark
    assert write("one", "two").fingerprint() == mark


def test_bug_24_every_rank_sees_the_same_picture(tmp_path: Path) -> None:
    """Nothing that a rank draws from its own random numbers reaches a row."""
    rows = []
    for rank in range(2):
        torch.manual_seed(rank)
        rows.append(encoder(tmp_path).encode(Sample(dialogue("What is it?", "A cat.", picture=True))))
    assert torch.equal(rows[0].tiles, rows[1].tiles)
    assert torch.equal(rows[0].ids, rows[1].ids)
    assert float(rows[0].tiles.std()) > 0
