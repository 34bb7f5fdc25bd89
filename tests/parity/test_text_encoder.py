"""The text encoder against transformers, and in diffusers' own pipelines."""

from __future__ import annotations

import inspect
from pathlib import Path

import diffusers
import pytest
import torch
from tokenizers import Tokenizer, processors
from torch import Tensor
from transformers import GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from accessory.diffusion.condition import Condition
from accessory.models import text_encoder, text_profiles
from accessory.models.text_encoder import PIPELINES, TextEncoder, prompt_embeds
from tests.tiny import tiny_tokenizer

TOL = {"rtol": 1e-4, "atol": 1e-5}
TEXTS = ["a red cat", "three birds on a green hat", ""]
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 360,
    "max_position_embeddings": 256,
    "pad_token_id": 3,
}


def saved(folder: Path, model: LlamaForCausalLM | GemmaForCausalLM) -> Path:
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    model.eval().save_pretrained(folder)
    tiny_tokenizer(folder)
    return folder


def fast_tokenizer(folder: Path, eos: bool) -> PreTrainedTokenizerFast:
    """transformers' own, which puts BOS (and EOS) around a text."""
    made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    specials = [(t, made.token_to_id(t)) for t in ("<s>", "</s>")]
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A" + (" </s>" if eos else ""), special_tokens=specials
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[LlamaForCausalLM, Path]:
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    return model, saved(tmp_path_factory.mktemp("llama"), model)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> tuple[GemmaForCausalLM, Path]:
    torch.manual_seed(4)
    model = GemmaForCausalLM(GemmaConfig(**SMALL))
    return model, saved(tmp_path_factory.mktemp("gemma"), model)


def load(folder: Path, profile: str) -> TextEncoder:
    return text_encoder.load(text_profiles.get(profile, size=None, dtype="fp32"), str(folder))


def same(ours: Condition, theirs: Tensor, mask: Tensor) -> None:
    assert ours.mask is not None
    assert ours.seq is not None
    assert torch.equal(ours.mask, mask.bool())
    torch.testing.assert_close(ours.seq[ours.mask], theirs[mask.bool()], **TOL)


@torch.no_grad()
def test_lumina_t2i_is_the_last_state_of_llama(llama: tuple[LlamaForCausalLM, Path]) -> None:
    model, folder = llama
    said = fast_tokenizer(folder, eos=True)(TEXTS, padding=True, return_tensors="pt")
    theirs = model.model(said.input_ids, attention_mask=said.attention_mask)
    ours = load(folder, "lumina-t2i").encode(TEXTS)
    assert ours.token_counts == tuple(said.attention_mask.sum(1).tolist())
    same(ours.condition, theirs.last_hidden_state, said.attention_mask)
    # and the norm is what makes it so
    e = text_encoder.load(text_profiles.get("lumina-t2i", size=None, dtype="fp32", normed=False), str(folder))
    raw = e.encode(TEXTS).condition.seq
    assert raw is not None
    assert (raw[0, :3] - theirs.last_hidden_state[0, :3]).abs().max() > 0.1


@torch.no_grad()
def test_lumina_next_is_the_last_but_one_state_of_gemma(gemma: tuple[GemmaForCausalLM, Path]) -> None:
    model, folder = gemma
    said = fast_tokenizer(folder, eos=False)(TEXTS, padding=True, pad_to_multiple_of=8, return_tensors="pt")
    theirs = model.model(said.input_ids, attention_mask=said.attention_mask, output_hidden_states=True).hidden_states
    ours = load(folder, "lumina-next").encode(TEXTS)
    assert said.input_ids.shape[1] % 8 == 0
    same(ours.condition, theirs[-2], said.attention_mask)
    assert ours.condition.seq is not None
    assert all((ours.condition.seq[0, :3] - theirs[i][0, :3]).abs().max() > 0.1 for i in (-1, -3))


@torch.no_grad()
def test_long_texts_up_to_the_context(llama: tuple[LlamaForCausalLM, Path]) -> None:
    model, folder = llama
    e = text_encoder.load(text_profiles.get("sphinx-13b", size=None, dtype="fp32", max_length=256), str(folder))
    text = "the small red cat and the bird " * 40
    found = e.encode([text])
    assert found.token_counts == (256,)
    assert found.truncated[0] == e.count(text) - 256 > 0
    ids = torch.tensor([e.tokenizer.encode(text, bos=True)[:256]])
    torch.testing.assert_close(found.condition.seq, model.model(ids).last_hidden_state, **TOL)


def condition(batch: int) -> Condition:
    return Condition(torch.randn(batch, 8, 32), torch.ones(batch, 8, dtype=torch.bool), torch.randn(batch, 16))


@pytest.mark.parametrize("name", list(PIPELINES))
def test_pipelines_know_the_names(name: str) -> None:
    known = inspect.signature(getattr(diffusers, name).__call__).parameters
    out = prompt_embeds(name, condition(2), condition(1))
    assert set(out) <= set(known)
    # all that a pipeline would compute from the prompt is there
    computed = {k for k in known if k.endswith(("prompt_embeds", "prompt_attention_mask")) and "ip_adapter" not in k}
    assert set(out) == computed


def lumina_pipeline(model: GemmaForCausalLM | None, folder: Path) -> diffusers.LuminaPipeline:
    torch.manual_seed(5)
    transformer = diffusers.LuminaNextDiT2DModel(
        sample_size=4, in_channels=4, hidden_size=32, num_layers=2, num_attention_heads=4, num_kv_heads=2,
        multiple_of=16, cross_attention_dim=32,
    )  # fmt: skip
    for p in transformer.parameters():
        torch.nn.init.normal_(p, std=0.2)
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    pipeline = diffusers.LuminaPipeline(
        transformer.eval(),
        diffusers.FlowMatchEulerDiscreteScheduler(),
        vae.eval(),
        None if model is None else model.model,
        None if model is None else fast_tokenizer(folder, eos=False),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def test_lumina_pipeline_draws_the_same_from_our_embeddings(gemma: tuple[GemmaForCausalLM, Path]) -> None:
    model, folder = gemma
    options = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "latent", "return_dict": False}
    latents = torch.randn(2, 4, 4, 4)
    theirs = lumina_pipeline(model, folder)(prompt=TEXTS[:2], clean_caption=False, latents=latents, **options)[0]
    e = load(folder, "lumina-next")
    bare = lumina_pipeline(None, folder)
    given = prompt_embeds("LuminaPipeline", e.encode(TEXTS[:2]), e.encode([""]))
    ours = bare(latents=latents, **given, **options)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    # and the prompt matters
    other = prompt_embeds("LuminaPipeline", e.encode(TEXTS[1::-1]), e.encode([""]))
    assert (bare(latents=latents, **other, **options)[0] - theirs).abs().max() > 1e-2
