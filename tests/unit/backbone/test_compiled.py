"""The compiled decoding step: the same answers, used only where it holds, and never a crash."""

import logging
import shutil

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from accessory.backbone.fast import accelerate, release
from accessory.backbone.generate import Sampling, generate, stream
from accessory.backbone.llama import Llama, LlamaConfig

SIZES = {"dim": 32, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 48, "vocab_size": 61, "tie_embeddings": True}
CONFIG = LlamaConfig(n_layers=2, **SIZES)
GREEDY = Sampling(max_new_tokens=8)

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler on this machine"
)


def build(config: LlamaConfig = CONFIG, dtype: torch.dtype = torch.float32) -> Llama:
    torch.manual_seed(3)
    model = Llama(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.to(dtype)


@pytest.fixture
def calls() -> list[int]:
    return []


def spied(model: Llama, calls: list[int]) -> Llama:
    """The accelerated model; every compiled step that ran leaves its position in ``calls``."""
    accelerate(model, compile=True)
    assert model.step is not None
    run = model.step._run

    def noted(*args: object) -> Tensor:
        scores = run(*args)
        calls.append(len(args[-1]))
        return scores

    model.step._run = noted
    return model


def prompt(model: Llama, length: int) -> Tensor:
    return model.embed(torch.arange(length) * 7 % 61).detach()


def scores_of(model: Llama, length: int, steps: int) -> Tensor:
    """Scores along a fixed continuation, through the step where there is one."""
    cache = model.cache(1, length + steps + 1)
    out = []
    with torch.inference_mode():
        model(prompt(model, length)[None], cache=cache)
        for i in range(steps):
            ids = torch.tensor([[i * 5 % 61]])
            if model.step is None:
                out.append(model.logits(model(model.embed(ids), cache=cache)))
            else:
                key = model.step.key(model)
                assert key is not None
                assert model.step.covers(model, ids, cache)
                out.append(model.step(key, model, ids, cache))
    return torch.cat(out).float()


@needs_compiler
def test_same_answers_from_one_graph(calls: list[int]) -> None:
    model, plain = spied(build(), calls), build()
    first = generate(model, [prompt(model, 5)], sampling=GREEDY)
    assert calls == [6, 7, 8, 9, 10, 11, 12]
    graphs = counters["stats"]["unique_graphs"]
    assert first == generate(plain, [prompt(plain, 5)], sampling=GREEDY)
    for length in (1, 9, 20):
        ours = generate(model, [prompt(model, length)], sampling=GREEDY)
        assert ours == generate(plain, [prompt(plain, length)], sampling=GREEDY)
    assert torch.allclose(scores_of(model, 6, 4), scores_of(plain, 6, 4), atol=1e-4)
    # A chat's second turn over the same cache, which the last token fills: that one takes the ordinary forward.
    caches = [m.cache(1, 16) for m in (model, plain)]
    del calls[:]
    for length, new in ((4, 5), (4, 5)):
        turns = [
            list(stream(m, prompt(m, length)[None], cache=c, sampling=Sampling(max_new_tokens=new)))
            for m, c in zip((model, plain), caches, strict=True)
        ]
        assert turns[0] == turns[1]
    assert caches[0].length == caches[1].length == 16
    assert calls == [5, 6, 7, 8, 13, 14, 15]
    # New numbers in the weights are read at the next step, also when a whole parameter is replaced.
    before = scores_of(model, 6, 2)
    for m in (model, plain):
        with torch.no_grad():
            m.layers[0].feed_forward.w2.weight.mul_(2)
            m.layers[1].attention.wo.weight = torch.nn.Parameter(m.layers[1].attention.wo.weight * 3)
    assert torch.allclose(scores_of(model, 6, 2), scores_of(plain, 6, 2), atol=1e-4)
    assert (scores_of(model, 6, 2) - before).abs().max() > 0.01
    assert counters["stats"]["unique_graphs"] == graphs  # all of this ran what was compiled for the first answer


@needs_compiler
def test_bf16_and_another_depth_get_their_own_graph() -> None:
    plain = build(LlamaConfig(n_layers=1, **SIZES), torch.bfloat16)
    expected = scores_of(plain, 6, 4)
    actual = scores_of(accelerate(plain, compile=True), 6, 4)
    assert plain.step is not None
    assert not plain.step.broken
    assert (actual - expected).abs().max() <= 0.05 * expected.abs().max()


def test_what_it_does_not_cover_takes_the_ordinary_forward(calls: list[int]) -> None:
    model, plain = spied(build(), calls), build()
    lengths = (3, 6)
    ours = generate(model, [prompt(model, n) for n in lengths], sampling=GREEDY)
    assert ours == generate(plain, [prompt(plain, n) for n in lengths], sampling=GREEDY)
    for m in (model, plain):
        m.layers[1].attention.wv.delta = torch.nn.Linear(32, 16, bias=False)
        torch.nn.init.constant_(m.layers[1].attention.wv.delta.weight, 0.1)
    ours = generate(model, [prompt(model, 4)], sampling=GREEDY)
    assert ours == generate(plain, [prompt(plain, 4)], sampling=GREEDY)
    assert model.step is not None
    assert model.step.key(model) is None
    windowed = spied(build(LlamaConfig(n_layers=2, window=4, **SIZES)), calls)
    ours = generate(windowed, [prompt(windowed, 6)], sampling=GREEDY)
    assert ours == generate(release(windowed), [prompt(windowed, 6)], sampling=GREEDY)
    assert windowed.step is None
    assert calls == []


def test_a_failing_compiler_is_said_once_and_costs_no_answer(caplog: pytest.LogCaptureFixture) -> None:
    model, plain = accelerate(build(), compile=True), build()
    assert model.step is not None

    def fail(*args: object) -> Tensor:
        raise RuntimeError("no C++ compiler found\nand a long trace")

    model.step._run = fail
    with caplog.at_level(logging.WARNING):
        ours = generate(model, [prompt(model, 4)], sampling=GREEDY)
        assert ours == generate(model, [prompt(model, 4)], sampling=GREEDY)
    assert ours == generate(plain, [prompt(plain, 4)], sampling=GREEDY)
    assert [r.getMessage() for r in caplog.records] == [
        "decoding runs uncompiled, because compiling failed: no C++ compiler found"
    ]
