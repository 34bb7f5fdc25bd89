"""What a dream bridge must pass, 13 items, and which test of this suite shows each.

 1 closed gates change nothing       2 open gates are their formula         3 causality of pictures
 4 hidden queries stay hidden        5 a batch is its rows                  6 two passes are one
 7 one null in training and use      8 eight pictures by heart              9 the trigger comes when it was learned
10 saved and loaded                 11 foreign checkpoints                 12 disjoint training
13 every stage runs

``SHOWN`` is the table; a name that no longer exists fails. Of 2, a scale on the input is not a dialect that we have
(ours scales the output); of 11, there are importers for DreamLLM's and ChatIllusion's bridges alone.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from accessory.backbone.generate import Sampling
from accessory.data.collate import collate
from accessory.data.encode import DreamLayout
from accessory.data.targets import TargetEncoder
from accessory.data.tiling import TilingConfig
from accessory.diffusion.sampler import Ode, SamplerSettings
from accessory.diffusion.time_grid import Grid
from accessory.models.build import TowerSource
from accessory.models.conditioner import DreamConditioner
from accessory.models.dream_loss import DreamLossConfig
from accessory.models.dream_spans import NullPolicy
from accessory.models.generator import Generator
from accessory.models.generator_config import DreamSource, FlagDiTSource
from accessory.nn.attention import Attention
from accessory.nn.linear import Linear
from accessory.peft.lora import LowRank
from accessory.peft.prefix import ZeroInitPrefix
from accessory.schema import Batch, Encoded, Picture, Sample, Turn
from accessory.serve.chat import ChatModel
from accessory.serve.illustrate import Controls
from accessory.serve.illustrated_chat import IllustratedModel
from accessory.tokens import DREAM_START
from accessory.train.config import TrainConfig
from accessory.train.generation import DiffusionConfig, DiffusionObjective, GenerationConfig, JointObjective
from accessory.train.loop import Result, train
from tests.structure.source import ROOT
from tests.tiny import tiny_config, tiny_tokenizer
from tests.tiny_generator import COLOURS, DREAM, LEARNER, PROFILE, caption_loader, draw_model

_DREAM, _WEIGHTS = "unit/models/test_dream.py", "unit/models/test_dream_weights.py"
_HERE = "e2e/test_dream_acceptance.py"
SHOWN: dict[int, tuple[str, ...]] = {
    1: (
        f"{_DREAM}::test_zero_heads_say_the_same_of_everything_as_of_nothing",
        f"{_DREAM}::test_text_scores_are_those_of_the_frozen_model",
        f"{_DREAM}::test_the_default_bridge_starts_as_the_text_encoder_bit_for_bit",
        "unit/peft/test_attach.py::test_attaching_changes_no_bit",
        "unit/diffusion/test_flag_dit.py::test_shut_gates_leave_the_pooled_vector_alone",
    ),
    2: (
        "unit/peft/test_prefix.py::test_the_formula",
        "unit/peft/test_lora.py::test_the_formula",
        "parity/test_peft_lib.py::test_llama_adapter",
        f"{_HERE}::test_open_gates_are_their_formula",
    ),
    3: (f"{_DREAM}::test_a_picture_knows_what_was_before_and_not_what_comes",),
    4: (
        f"{_DREAM}::test_hidden_spans_leave_later_text_as_it_would_be_without_them",
        "unit/models/test_dream_spans.py::test_hidden_spans_are_not_counted",
    ),
    5: (
        f"{_DREAM}::test_a_batch_gives_what_its_rows_give_alone",
        f"{_DREAM}::test_documents_in_a_batch_give_what_they_give_alone",
        "unit/models/test_connector.py::test_the_encoder_looks_both_ways_and_past_padding",
        "unit/models/test_connector.py::test_heads_read_what_is_real",
        "unit/models/test_dream_queries.py::test_a_picture_keeps_its_noise_in_any_batch_and_in_one_forward",
    ),
    6: (
        f"{_DREAM}::test_two_passes_are_one_forward",
        f"{_DREAM}::test_a_document_dreamt_step_by_step_is_the_document_in_one_forward",
    ),
    7: (
        f"{_DREAM}::test_the_null_of_training_is_that_of_inference",
        "unit/models/test_dream_queries.py::test_the_null_draws_nothing_in_training_either",
        "unit/train/test_generation.py::test_dropped_rows_get_the_null_of_inference",
    ),
    8: (f"{_HERE}::test_eight_pictures_are_drawn_as_they_were_asked_for",),
    9: (
        f"{_HERE}::test_documents_learned_by_heart_bring_their_number_of_pictures",
        "unit/models/test_dream_edges.py::test_the_trigger_is_learned_beside_a_frozen_table",
    ),
    10: (
        f"{_WEIGHTS}::test_a_saved_bridge_says_the_same",
        f"{_WEIGHTS}::test_the_file_of_a_7b_model_is_below_one_percent_of_it",
        f"{_WEIGHTS}::test_keys_that_do_not_fit_are_listed",
        "unit/models/test_generator.py::test_saved_pictures_come_back_bit_for_bit",
    ),
    11: (
        f"{_WEIGHTS}::test_dreamllm_comes_and_goes",
        f"{_WEIGHTS}::test_dreamllm_plugin_files_are_read",
        f"{_WEIGHTS}::test_unknown_dreamllm_keys_are_listed",
        f"{_WEIGHTS}::test_a_gen_adapter_is_renamed",
        "conformance/test_dream_golden.py::test_cases_pass",
    ),
    12: (
        "unit/train/test_disjoint.py::test_each_kind_of_row_changes_its_own_group_alone",
        "unit/train/test_disjoint.py::test_and_without_groups_every_row_changes_everything",
    ),
    13: ("e2e/test_dream_stages.py::test_a_stage_runs_from_its_file_to_a_picture",),
}


def test_the_table_names_tests_that_exist() -> None:
    assert list(SHOWN) == list(range(1, 14))
    for names in SHOWN.values():
        for name in names:
            file, _, function = name.partition("::")
            tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
            assert function in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}, name


# --- 2: dialects of adapters ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_open_gates_are_their_formula() -> None:
    """A prefix of one token needs no softmax; one gate for all heads is that gate for each; scales are on the output;
    LoRA without alpha has no factor."""
    attention, prefix = Attention(16, 4, 2, 4), ZeroInitPrefix(4, 4, 16, length=1)
    prefix.gate.fill_(0.7)
    q, context = torch.randn(2, 4, 3, 4), torch.randn(2, 1, 16)
    value = attention.wv(prefix.tokens + context).unflatten(-1, (2, 4)).repeat_interleave(2, dim=2)
    # (B, 1, H, A) -> (B, H, 1, A), the same at every position
    expected = torch.tensor(0.7).tanh() * value.transpose(1, 2)
    torch.testing.assert_close(prefix(q, attention, context), expected.expand(-1, -1, 3, -1))
    prefix.gate[2] = 0.0
    assert not prefix(q, attention, context)[:, 2].any()
    linear, x = Linear(6, 5, bias=True), torch.randn(3, 6)
    plain = linear(x)
    linear.scale = nn.Parameter(torch.randn(5))
    torch.testing.assert_close(linear(x), linear.scale * (x @ linear.weight.T + linear.bias))
    assert (linear(x) - plain).abs().max() > 1e-2
    linear.scale, linear.delta = None, LowRank(6, 5, 2, None)
    for p in linear.delta.parameters():
        nn.init.normal_(p)
    low: Any = linear.delta
    torch.testing.assert_close(linear(x), plain + x @ low.a.weight.T @ low.b.weight.T)
    assert (linear(x) - plain).abs().max() > 1e-2


# --- 8: eight pictures ------------------------------------------------------------------------------------------------

SIDE = 8
BUSY = 1200  # seconds; it takes about 13 of a processor's own, of which a busy machine gives few
BRIDGE = tuple(f"conditioner.dream.{n}" for n in ("queries", "start*", "end", "mix.*", "connector.*", "heads.*"))
SMALL = FlagDiTSource(replace(LEARNER, dim=64, n_layers=2))
NEVER = DiffusionConfig(drop=NullPolicy(all=0.0))
PLAIN = SamplerSettings(Ode(method="euler"), Grid(points=9), guidance=None)
PROMPTS = [f"a {colour} square" for colour in COLOURS]


def settings(folder: Path, steps: int, lr: float) -> TrainConfig:
    return TrainConfig(
        output_dir=str(folder), max_steps=steps, lr=lr, batch_size=32, precision="fp32", checkpoint_every=10**6,
        warmup_steps=10, betas=(0.9, 0.98), tensorboard=False,
    )  # fmt: skip


def probe(pictures: Tensor) -> nn.Linear:
    """A linear classifier of pictures (N, 3, S, S), trained on noisy copies of one of each class."""
    g = torch.Generator().manual_seed(0)
    made = nn.Linear(pictures[0].numel(), len(pictures))
    with torch.no_grad():
        made.weight.zero_()
        made.bias.zero_()
    optimizer, labels = torch.optim.Adam(made.parameters(), lr=1e-2), torch.arange(len(pictures))
    for _ in range(200):
        noisy = pictures + 0.1 * torch.randn(pictures.shape, generator=g)
        loss = nn.functional.cross_entropy(made(noisy.flatten(1) - 0.5), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    held_out = pictures + 0.1 * torch.randn(pictures.shape, generator=g)
    assert torch.equal(made(held_out.flatten(1) - 0.5).argmax(-1), labels), "the probe knows real pictures"
    return made


def seen_as(classifier: nn.Linear, pictures: list[Image.Image]) -> list[int]:
    """Numbers of the classes that pictures are taken for."""
    pixels = torch.stack([torch.tensor(list(p.tobytes())).view(SIDE, SIDE, 3).permute(2, 0, 1) for p in pictures])
    with torch.no_grad():
        return classifier((pixels / 255 - 0.5).flatten(1)).argmax(-1).tolist()


@pytest.mark.timeout(BUSY)
def test_eight_pictures_are_drawn_as_they_were_asked_for(tmp_path: Path) -> None:
    def batches(size: int) -> Any:
        made = caption_loader(tmp_path, size)
        made.encoder = TargetEncoder(SIDE)
        return made

    model = draw_model(tmp_path, dream=True, size=SIDE, denoiser=SMALL, tuning=("denoiser.*", *BRIDGE))
    objective = DiffusionObjective(NEVER, seed=0)
    fixed = next(iter(batches(64)))  # the losses of eight pictures, each at eight times

    def mean() -> float:
        with torch.no_grad():
            return float(objective(model, fixed)[0]) / 64

    before = mean()
    start = model.eval().generate(PROMPTS, seeds=range(8), settings=PLAIN)
    train(model.train(), batches(32), objective, settings(tmp_path / "run", 400, 6e-3))
    after = mean()
    assert before > 1
    assert after < 0.12 * before
    assert fixed.targets is not None
    real = dict(zip(fixed.targets.prompts, fixed.targets.pixels, strict=True))
    classifier, asked = probe(torch.stack([real[prompt] for prompt in PROMPTS])), list(range(8))
    model.eval()
    drawn = seen_as(classifier, model.generate(PROMPTS, seeds=range(8), settings=PLAIN))
    again = seen_as(classifier, model.generate(PROMPTS, seeds=range(100, 108), settings=PLAIN))
    assert drawn == asked
    assert again == asked, "whatever the noise"
    # And it matters: what is asked for decides, and an untrained model is taken for what its noise looks like.
    turned = PROMPTS[3:] + PROMPTS[:3]
    assert seen_as(classifier, model.generate(turned, seeds=range(8), settings=PLAIN)) == [*range(3, 8), *range(3)]
    assert sum(a == b for a, b in zip(seen_as(classifier, start), asked, strict=True)) <= 3


# --- 9: the trigger ---------------------------------------------------------------------------------------------------

NOUNS = ("cat", "hat", "bird", "dog", "boat", "star", "apple", "moon")
ASKED = ("Where is the {}?", "Read the {}.", "How many {}?", "What is the {}?")


def documents() -> list[tuple[str, int, Sample]]:
    """32 requests, the number of pictures that each is answered with (0 to 3, to be learned by heart), and the answer:
    text, picture, text, picture, ... and a last word."""
    out = []
    for i in range(32):
        request, count = ASKED[i // 8].format(NOUNS[i % 8]), (i * 7 + i // 8) % 4
        parts: list[str | Picture] = []
        for k in range(count):
            parts += [f"The {NOUNS[(i + k) % 8]}", Picture(Image.new("RGB", (SIDE, SIDE), COLOURS[k]))]
        answer = Turn("assistant", (*parts, "There."))
        out.append((request, count, Sample((Turn("user", (request,)), answer))))
    return out


class Documents:
    """All rows in every batch, as ever new draws."""

    def __init__(self, rows: list[Encoded], pad_id: int) -> None:
        self.rows, self.pad_id = rows, pad_id

    def __iter__(self) -> Iterator[Batch]:
        for k in range(10**6):
            yield collate([replace(r, draw=k * len(self.rows) + i) for i, r in enumerate(self.rows)], self.pad_id)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None: ...


def storyteller(folder: Path) -> Generator:
    """A language model, a bridge and a denoiser that all train; it sees in tiles of 32 pixels."""
    model = replace(
        tiny_config(tiny_tokenizer(folder / "words")),
        tower=TowerSource(preset="tiny-clip", weights=None),
        tiling=TilingConfig(size=32),
    )
    backbone = ("conditioner.dream.net.backbone.*", "conditioner.dream.net.projector.*")
    return draw_model(
        folder, dream=True, size=SIDE, denoiser=SMALL, tuning=("denoiser.*", *BRIDGE, *backbone),
        conditioner=DreamSource(model, replace(DREAM, joint=True), PROFILE),
    )  # fmt: skip


def learn(model: Generator, told: list[Sample], folder: Path, steps: int) -> Result:
    assert isinstance(model.conditioner, DreamConditioner)
    own, queries = model.conditioner.model.encoder, model.conditioner.dream.config.num_queries
    encoder = own.under(own.template, DreamLayout(queries, SIDE))
    rows = [encoder.encode(sample) for sample in told]
    assert sum(int((r.labels == DREAM_START).sum()) for r in rows) == sum(len(r.targets) for r in rows) > 40
    objective = JointObjective(GenerationConfig(NEVER, DreamLossConfig(language=1.0, picture=1.0)), seed=0)
    return train(model.train(), Documents(rows, encoder.pad_id), objective, settings(folder, steps, 8e-3))


def drawn(model: Generator, requests: list[str]) -> list[tuple[int, str]]:
    """How many pictures the engine brings for each request, and its text."""
    assert isinstance(model.conditioner, DreamConditioner)
    chats = IllustratedModel(ChatModel(model.conditioner.model, sampling=Sampling(max_new_tokens=40)), model.eval())
    out = []
    for request in requests:
        parts = chats.new_chat().say(request, controls=Controls(max_images=6, settings=PLAIN))
        out.append((sum(isinstance(p, Picture) for p in parts), "".join(p for p in parts if isinstance(p, str))))
    return out


@pytest.mark.timeout(BUSY)
def test_documents_learned_by_heart_bring_their_number_of_pictures(tmp_path: Path) -> None:
    told = documents()
    requests, counts = [t[0] for t in told], [t[1] for t in told]
    assert sorted({c: counts.count(c) for c in counts}.values()) == [8, 8, 8, 8]
    model = storyteller(tmp_path)
    fresh = sum(found == c for (found, _), c in zip(drawn(model, requests[:8]), counts, strict=False))
    assert fresh <= 3, "chance: a model that was not trained does not know them"
    row = learn(model, [t[2] for t in told], tmp_path / "run", 200).row
    assert row["language"] < 0.05
    made = drawn(model, requests)
    assert [found for found, _ in made] == counts
    assert all(text.endswith("There.") for _, text in made), "the text goes on behind the pictures"
    # And it matters that the trigger is labelled: with the vector that scores it as it was, none comes.
    assert isinstance(model.conditioner, DreamConditioner)
    dream = model.conditioner.dream
    assert dream.start_output is not None
    with torch.no_grad():
        dream.start_output.copy_(dream.net.backbone.tok_embeddings.weight.mean(0))
    assert [found for found, _ in drawn(model, requests[:8])] == [0] * 8 != counts[:8]
