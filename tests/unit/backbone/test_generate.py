"""Sampling: parity with transformers, rows independent of their batch, the cache contract, stop strings."""

import math
from collections import Counter

import pytest
import torch
from transformers import LlamaConfig as HFConfig
from transformers import (
    LlamaForCausalLM,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from accessory.backbone.fast import accelerate, release
from accessory.backbone.generate import Row, Sampling, StopMatcher, generate, keep_top_k, keep_top_p, penalize, stream
from accessory.backbone.llama import Llama, LlamaConfig

V = 61
SAMPLED = Sampling(max_new_tokens=12, temperature=0.9, top_k=30, top_p=0.95, repetition_penalty=1.2, seed=5)


def reference() -> LlamaForCausalLM:
    config = HFConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        vocab_size=V,
        bos_token_id=None,
        eos_token_id=None,
        rms_norm_eps=1e-5,
    )
    model = LlamaForCausalLM(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def converted(hf: LlamaForCausalLM) -> Llama:
    names = {
        "self_attn.q_proj": "attention.wq",
        "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.embed_tokens": "tok_embeddings",
        "lm_head": "output",
        "model.norm": "norm",
        "model.layers": "layers",
    }
    state = {}
    for key, w in hf.state_dict().items():
        if "q_proj" in key or "k_proj" in key:  # halves to interleaved pairs
            w = w.view(-1, 2, 4, w.shape[1]).transpose(1, 2).reshape(w.shape)
        for theirs, ours in names.items():
            key = key.replace(theirs, ours)
        state[key] = w
    model = Llama(LlamaConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, vocab_size=V)).eval()
    model.load_state_dict(state)
    return model


@pytest.fixture
def model() -> Llama:
    return converted(reference())


def prompts(model: Llama, lengths: tuple[int, ...]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    ids = [torch.randint(0, V, (n,)) for n in lengths]
    with torch.no_grad():
        return ids, [model.embed(row[None])[0] for row in ids]


def test_greedy_equals_transformers() -> None:
    hf = reference()
    ours = converted(hf)
    ids, x = prompts(ours, (7,))
    theirs = hf.generate(ids[0][None], max_new_tokens=20, do_sample=False)[0, 7:].tolist()
    mine = generate(ours, x, sampling=Sampling(max_new_tokens=20))[0]
    assert mine == theirs
    assert len(set(mine)) > 2  # not a constant that any model would repeat


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_greedy_with_repetition_penalty_equals_transformers(penalty: float) -> None:
    hf = reference()
    ours = converted(hf)
    ids, x = prompts(ours, (7,))
    theirs = hf.generate(ids[0][None], max_new_tokens=20, do_sample=False, repetition_penalty=penalty)[0, 7:].tolist()
    mine = generate(ours, x, ids=ids, sampling=Sampling(max_new_tokens=20, repetition_penalty=penalty))[0]
    assert mine == theirs
    assert mine != generate(ours, x, sampling=Sampling(max_new_tokens=20))[0]


@pytest.mark.parametrize("value", [1, 5, 60, 61, 500])
def test_top_k_parity(value: int) -> None:
    scores = torch.randn(4, V) * 3
    theirs = TopKLogitsWarper(value)(torch.zeros(4, 1, dtype=torch.long), scores)
    assert torch.equal(torch.stack([keep_top_k(row, value) for row in scores]), theirs)


@pytest.mark.parametrize("value", [0.01, 0.3, 0.9, 0.999])
def test_top_p_parity(value: float) -> None:
    scores = torch.randn(4, V) * 3
    theirs = TopPLogitsWarper(value)(torch.zeros(4, 1, dtype=torch.long), scores)
    assert torch.equal(torch.stack([keep_top_p(row, value) for row in scores]), theirs)
    assert theirs.isinf().any()


def test_penalty_parity() -> None:
    ids = torch.randint(0, V, (1, 9))
    scores = torch.randn(1, V)
    seen = torch.zeros(V, dtype=torch.bool).index_fill(0, ids[0], True)
    assert torch.equal(penalize(scores[0], seen, 1.4)[None], RepetitionPenaltyLogitsProcessor(1.4)(ids, scores))


def test_draws_follow_the_distribution_of_transformers_chain() -> None:
    ids, scores = torch.tensor([[3, 8, 8, -1]]), torch.randn(V) * 2
    chain = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.5),
            TemperatureLogitsWarper(0.8),
            TopKLogitsWarper(8),
            TopPLogitsWarper(0.9),
        ]
    )
    expected = chain(ids[:, :3], scores[None].clone())[0].softmax(-1)
    sampling = Sampling(temperature=0.8, top_k=8, top_p=0.9, repetition_penalty=1.5)
    row = Row(sampling, V, ids[0], torch.device("cpu"))
    row.generator.manual_seed(0)
    start = row.seen.clone()
    counts: Counter[int] = Counter()
    for _ in range(4000):
        row.seen = start.clone()
        counts[row.choose(scores)] += 1
    drawn = torch.tensor([counts[i] / 4000 for i in range(V)])
    assert 2 <= int((expected > 0).sum()) <= 8
    assert not drawn[expected == 0].any()
    assert (drawn - expected).abs().max() < 4 * math.sqrt(0.25 / 4000)


@pytest.mark.parametrize("sampling", [Sampling(max_new_tokens=12), SAMPLED], ids=["greedy", "sampled"])
def test_batch_of_unequal_prompts_equals_singles(model: Llama, sampling: Sampling) -> None:
    ids, x = prompts(model, (3, 9, 1, 6))
    together = generate(model, x, ids=ids, sampling=sampling)
    alone = [generate(model, [row], ids=[i], sampling=sampling)[0] for row, i in zip(x, ids)]
    assert together == alone
    assert len({tuple(row) for row in together}) == 4


def test_padding_without_a_mask_would_matter(model: Llama) -> None:
    _, x = prompts(model, (3,))
    padded = torch.cat((torch.zeros(6, 32), x[0]))
    with torch.no_grad():
        right = model(x[0][None])[:, -1]
        wrong = model(padded[None])[:, -1]
    assert (right - wrong).abs().max() > 0.1


def test_rows_may_have_their_own_sampling(model: Llama) -> None:
    _, x = prompts(model, (5, 5))
    greedy = Sampling(max_new_tokens=3)
    together = generate(model, x, sampling=[greedy, SAMPLED])
    assert together == [generate(model, x[:1], sampling=greedy)[0], generate(model, x[1:], sampling=SAMPLED)[0]]
    assert [len(row) for row in together] == [3, 12]


def test_seed_decides(model: Llama) -> None:
    _, x = prompts(model, (5,))
    runs = [generate(model, x, sampling=Sampling(max_new_tokens=16, temperature=2.0, seed=s))[0] for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_stop_id_ends_a_row_and_only_that_row(model: Llama) -> None:
    _, x = prompts(model, (5, 8))
    free = generate(model, x, sampling=Sampling(max_new_tokens=10))
    stop = next(t for t in free[0][1:] if t not in free[1])
    steps = list(stream(model, x[0][None], sampling=Sampling(max_new_tokens=10, stop_ids=(stop,))))
    end = free[0].index(stop) + 1
    assert [s[0] for s in steps] == free[0][:end]
    both = generate(model, x, sampling=Sampling(max_new_tokens=10, stop_ids=(stop,)))
    assert both == [free[0][:end], free[1]]


def test_none_for_a_finished_row(model: Llama) -> None:
    x = torch.stack(prompts(model, (4, 4))[1])
    steps = list(stream(model, x, sampling=[Sampling(max_new_tokens=1), Sampling(max_new_tokens=3)]))
    assert [[t is None for t in s] for s in steps] == [[False, False], [True, False], [True, False]]


@pytest.mark.parametrize("taken", [1, 4, 9])
def test_chat_continues_on_the_cache(model: Llama, taken: int) -> None:
    """At any stop the cache holds all but the newest token; the next turn from it equals a recomputation."""
    ids, x = prompts(model, (6, 5))
    cache = model.cache(1, 64)
    tokens = []
    for step in stream(model, x[0][None], cache=cache, sampling=Sampling(max_new_tokens=9)):
        tokens.append(step[0])
        if len(tokens) == taken:
            break
    assert cache.length == 6 + taken - 1
    turn = torch.cat((model.embed(torch.tensor([tokens[-1:]])), x[1][None]), dim=1).detach()
    again = [s[0] for s in stream(model, turn, cache=cache, sampling=Sampling(max_new_tokens=7))]
    whole = torch.cat((ids[0], torch.tensor(tokens), ids[1]))
    assert again == generate(model, [model.embed(whole[None])[0].detach()], sampling=Sampling(max_new_tokens=7))[0]
    assert cache.length == len(whole) + 6
    assert again != generate(model, x[1:], sampling=Sampling(max_new_tokens=7))[0]  # the first turn matters


def test_prefill_scores_only_the_last_position(model: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    logits = Llama.logits
    monkeypatch.setattr(Llama, "logits", lambda self, h: (shapes.append(tuple(h.shape)), logits(self, h))[1])
    generate(model, prompts(model, (9, 4))[1], sampling=Sampling(max_new_tokens=3))
    assert shapes == [(2, 1, 32)] * 3


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"stop": ("a", "")}, "empty"),
    ],
)
def test_bad_sampling_is_refused(bad: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Sampling(**bad)


def test_bad_calls_are_refused_before_the_first_step(model: Llama) -> None:
    x = torch.stack(prompts(model, (4, 4))[1])
    with pytest.raises(ValueError, match="holds 8"):
        stream(model, x, cache=model.cache(2, 8), sampling=Sampling(max_new_tokens=6))
    assert len(list(stream(model, x, cache=model.cache(2, 8), sampling=Sampling(max_new_tokens=5)))) == 5
    with pytest.raises(ValueError, match="1 samplings for 2 rows"):
        stream(model, x, sampling=[Sampling()])
    with pytest.raises(ValueError, match="empty prompt"):
        stream(model, x[:, :0], sampling=Sampling())
    assert generate(model, [], sampling=Sampling()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accelerated_model_computes_the_same(model: Llama, dtype: torch.dtype) -> None:
    model = model.to(dtype)
    keys = list(model.state_dict())
    x = torch.randn(8, 5, 32).to(dtype)
    with torch.no_grad():
        model.layers[0].attention.wq.bias = torch.nn.Parameter(torch.randn(32))
        before = model.logits(model(x))
        accelerate(model)
        assert model.layers[0].attention.fused is not None
        after = model.logits(model(x))
        model.layers[1].attention.wv.delta = torch.nn.Linear(32, 16, bias=False, dtype=dtype)
        model.layers[1].attention.wv.delta.weight.mul_(4)
        adapted = model.logits(model(x))
        release(model)
        plain = model.logits(model(x))
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    scale = before.abs().max()
    assert (after - before).abs().max() <= tolerance * scale
    assert (adapted - plain).abs().max() <= tolerance * scale
    assert (adapted - after).abs().max() > 2 * tolerance * scale  # a delta on a fused layer is not lost
    model.layers[0].attention.wq.bias = model.layers[1].attention.wv.delta = None
    assert list(model.state_dict()) == keys


def test_accelerated_model_notices_changed_weights_and_gradients(model: Llama) -> None:
    x = torch.randn(1, 5, 32)
    accelerate(model)
    with torch.no_grad():
        before = model(x)
        for block in model.layers:
            block.attention.wv.weight.mul_(2)
            block.feed_forward.w2.weight.mul_(0.5)
        after = model(x)
        assert (after - before).abs().max() > 0.01
        assert torch.allclose(after, release(model)(x), atol=1e-5)
    accelerate(model)(x.requires_grad_(True)).sum().backward()
    assert x.grad.abs().max() > 0
    assert all(p.grad is not None for p in model.layers.parameters())


def through(matcher: StopMatcher, pieces: list[str]) -> tuple[str, bool]:
    shown = ""
    for piece in pieces:
        text, stopped = matcher.push(piece)
        shown += text
        if stopped:
            return shown, True
    return shown + matcher.flush(), False


@pytest.mark.parametrize("size", [1, 2, 3, 50])
@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("Hello### more", ("###",), "Hello"),
        ("Hello## more", ("###",), "Hello## more"),
        ("aababc", ("abc",), "aab"),
        ("one\nUser: two", ("\nUser:", "###"), "one"),
        ("no stop at all", (), "no stop at all"),
        ("###", ("###",), ""),
        ("ends with ##", ("###",), "ends with ##"),
    ],
)
def test_stop_strings_however_text_is_cut(size: int, text: str, stop: tuple[str, ...], shown: str) -> None:
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    assert through(StopMatcher(stop), pieces) == (shown, shown != text)


def test_text_that_cannot_become_a_stop_string_is_shown_at_once() -> None:
    matcher = StopMatcher(("###",))
    assert matcher.push("a#") == ("a", False)
    assert matcher.push("b") == ("#b", False)
    assert matcher.push("##") == ("", False)
    assert matcher.push("#x") == ("", True)
    assert matcher.push("y") == ("", True)
