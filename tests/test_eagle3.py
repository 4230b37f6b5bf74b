"""A sequential head of the EAGLE-3 form: its states, its loss, its training, its decoding."""

from __future__ import annotations

import copy
import itertools
from collections import deque
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from dynamo_lm import DynaMoForCausalLM
from dynamo_lm.decoding import sequential
from dynamo_lm.decoding.draft_length import WINDOW, AdaptiveDraftLength
from dynamo_lm.errors import InputError
from dynamo_lm.training.loss import heads_loss, target_counts
from dynamo_lm.training.options import TrainingOptions

VOCABULARY = 61


@pytest.fixture(autouse=True)
def unsure_heads_draft(monkeypatch):
    """These heads are random, so that no draft is likely."""
    monkeypatch.setattr(sequential, "LEAST_CONFIDENCE", 0.0)


@cache
def _base(layers: int, kv_heads: int, tied: bool):
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(config).eval()
        for parameter in base.parameters():
            if parameter.ndim > 1:
                parameter.data.mul_(3)
    return base


def eagle(layers: int = 8, kv_heads: int = 2, tied: bool = False, num_heads: int = 4, seed: int = 0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = DynaMoForCausalLM.from_base(
            copy.deepcopy(_base(layers, kv_heads, tied)), num_heads=num_heads, head="eagle3", **options
        )
        for parameter in model.heads.parameters():
            if parameter.ndim > 1:
                parameter.data.mul_(3)
            else:
                parameter.data.uniform_(0.5, 1.5)
    return model.eval().freeze_base()


# ---------------------------------------------------------------- the plain reference: one position at a time, no batching


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean() + eps).sqrt() * weight


def _rotated(x: Tensor, position: int, theta: float) -> Tensor:
    half = len(x) // 2
    angles = position * theta ** (-2 * torch.arange(half) / len(x))
    low, high = x[:half], x[half:]
    return torch.cat([low * angles.cos() - high * angles.sin(), high * angles.cos() + low * angles.sin()])


def reference_states(model: DynaMoForCausalLM, tokens: list[int], steps: int) -> dict[tuple[int, int], Tensor]:
    """{(position i, step k): the state that predicts token i + k + 1} of one document, as decoding it would compute them."""
    w = {name: tensor.double() for name, tensor in model.heads[0].state_dict().items()}
    config, embed = model.base.config, model.get_input_embeddings().weight.double()
    eps, theta, size = config.rms_norm_eps, config.rope_parameters["rope_theta"], config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    with torch.no_grad():
        layers = model.base(torch.tensor([tokens]), output_hidden_states=True).hidden_states
    count = config.num_hidden_layers
    features = torch.cat([layers[i][0] for i in (2, count // 2, count - 3)], -1).double()

    def one(token: int, state: Tensor, position: int, seen: list) -> tuple[Tensor, tuple]:
        """The layer at one position that sees the (keys, values) in `seen` and its own."""
        normed = [
            _rms(embed[token], w["midlayer.input_layernorm.weight"], eps),
            _rms(state, w["midlayer.hidden_norm.weight"], eps),
        ]
        x = torch.cat(normed)
        q, k, v = ((w[f"midlayer.self_attn.{name}_proj.weight"] @ x).view(-1, size) for name in "qkv")
        keys = torch.stack([_rotated(key, position, theta) for key in k])
        seen = [*seen, (keys, v)]
        mixed = []
        for head in range(heads):
            group = head * kv_heads // heads
            query = _rotated(q[head], position, theta)
            weights = torch.stack([query @ keys[group] for keys, _ in seen]) / size**0.5
            mixed.append(sum(p * v[group] for p, (_, v) in zip(weights.softmax(0), seen, strict=True)))
        state = state + w["midlayer.self_attn.o_proj.weight"] @ torch.cat(mixed)
        x = _rms(state, w["midlayer.post_attention_layernorm.weight"], eps)
        inner = F.silu(w["midlayer.mlp.gate_proj.weight"] @ x) * (w["midlayer.mlp.up_proj.weight"] @ x)
        return state + w["midlayer.mlp.down_proj.weight"] @ inner, seen[-1]

    found, held = {}, []
    for i in range(len(tokens) - 1):
        state, pair = one(tokens[i + 1], w["fc.weight"] @ features[i], i, held)
        held.append(pair)
        chain = list(held)
        for step in range(1, steps + 1):
            found[i, step] = _rms(state, w["norm.weight"], eps)
            if i + step + 1 >= len(tokens):
                break
            state, pair = one(tokens[i + step + 1], state, i + step, chain)
            chain.append(pair)
    return found


def reference_loss(model: DynaMoForCausalLM, documents: list[list[int]], kl: float, ids: Tensor | None) -> Tensor:
    """Sums of the losses of steps 1.., by the definitions."""
    sums = torch.zeros(model.num_heads - 1, dtype=torch.float64)
    for tokens in documents:
        with torch.no_grad():
            base = model.base(torch.tensor([tokens])).logits[0].double()
        for (i, step), state in reference_states(model, tokens, model.num_heads - 1).items():
            if i + step + 1 >= len(tokens):
                continue
            head = model.heads[0]
            weight = (head.lm_head.weight if ids is not None else model.output_weight()).double()
            teacher = base[i + step]
            label = tokens[i + step + 1]
            if ids is not None:
                teacher = teacher[ids]
                label = ids.tolist().index(label) if label in ids.tolist() else None
            p, logq = teacher.softmax(0), (weight @ state).log_softmax(0)
            sums[step - 1] += kl * (p * (p.log() - logq)).sum()
            if label is not None:
                sums[step - 1] -= (1 - kl) * logq[label]
    return sums


def _packed(documents: list[list[int]]) -> dict[str, Tensor]:
    tokens = torch.tensor([[token for document in documents for token in document]])
    segments = torch.tensor([[number for number, document in enumerate(documents) for _ in document]])
    positions = torch.tensor([[place for document in documents for place in range(len(document))]])
    return {"tokens": tokens, "segments": segments, "positions": positions}


@given(
    documents=st.lists(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=6), min_size=1, max_size=3),
    layers=st.sampled_from([7, 8]),
    kv_heads=st.sampled_from([1, 2, 4]),
    tied=st.booleans(),
    num_heads=st.integers(2, 5),
    kl=st.sampled_from([0.0, 0.5, 1.0]),
    short=st.booleans(),
    seed=st.integers(0, 3),
)
@settings(max_examples=12, deadline=None)
def test_the_loss_of_training_time_test_is_that_of_unrolling_every_position_alone(
    documents, layers, kv_heads, tied, num_heads, kl, short, seed
):
    ids = torch.arange(1, VOCABULARY, 3) if short else None
    model = eagle(layers, kv_heads, tied, num_heads, seed, draft_vocab_size=0 if ids is None else len(ids))
    if ids is not None:
        model.heads[0].set_draft_vocabulary(ids, model.output_weight())
        model.heads[0].lm_head.weight.data.add_(0.1)  # its own rows, not the base's
    batch = _packed(documents)
    options = TrainingOptions(steps=1, lr_b=0, lr_mb=0, bf16=False, kl=kl)
    counts = target_counts(batch["tokens"], batch["segments"], num_heads)
    sums = heads_loss(model, **batch, options=options, counts=counts, vocabulary=ids)
    expected = reference_loss(model, documents, kl, ids)
    assert torch.allclose(sums[1:].double(), expected, rtol=1e-4, atol=1e-4)
    assert all(parameter.grad is None for parameter in model.base.parameters())


def test_the_gradient_is_that_of_the_mean_losses():
    model, documents = eagle(), [[5, 9, 2, 7, 7, 1], [3, 8, 4]]
    batch = _packed(documents)
    counts = target_counts(batch["tokens"], batch["segments"], 4)
    options = TrainingOptions(steps=1, lr_b=0, lr_mb=0, bf16=False, kl=1.0)
    heads_loss(model, **batch, options=options, counts=counts)
    weight = model.heads[0].midlayer.self_attn["k_proj"].weight
    taken, change = weight.grad.clone(), torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    values = []
    for sign in (1, -1):
        weight.data.add_(sign * 1e-3 * change)
        sums = heads_loss(model, **batch, options=options, counts=counts)[1:]
        values.append((sums.double() / torch.tensor(counts[1:])).sum().item())
        weight.data.add_(-sign * 1e-3 * change)
    assert (values[0] - values[1]) / 2e-3 == pytest.approx((taken * change).sum().item(), rel=0.02)


@pytest.mark.parametrize("short", [False, True])
def test_a_copy_of_the_last_layer_begins_as_it(short):
    base = copy.deepcopy(_base(8, 2, False))
    ids = VOCABULARY // 2 if short else 0
    head = DynaMoForCausalLM.from_base(base, 4, head="eagle3", init="copy", draft_vocab_size=ids).heads[0]
    last = base.model.layers[-1]
    assert torch.equal(head.midlayer.mlp["up_proj"].weight, last.mlp.up_proj.weight)
    assert torch.equal(head.midlayer.self_attn["q_proj"].weight[:, 32:], last.self_attn.q_proj.weight)
    assert torch.equal(head.fc.weight, torch.eye(32).repeat(1, 3) * (torch.arange(96) >= 64))
    if short:
        assert torch.equal(head.lm_head.weight, base.lm_head.weight[:ids])


# ---------------------------------------------------------------- decoding


@pytest.mark.parametrize("short", [False, True])
def test_greedy_text_is_the_bases_own(short):
    model = eagle(draft_vocab_size=20 if short else 0)
    prompts = torch.randint(0, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(3))
    lengths = [9, 4, 7]
    mask = torch.tensor([[1] * length + [0] * (9 - length) for length in lengths])
    out = model.generate(prompts, attention_mask=mask, max_new_tokens=20, do_sample=False, eos_token_id=None)
    for row, length in enumerate(lengths):
        alone = model.base.generate(prompts[row : row + 1, :length], max_new_tokens=20, do_sample=False, eos_token_id=None)
        assert out[row, 9:].tolist() == alone[0, length:].tolist()


@pytest.mark.parametrize("pattern", [[True], [True, False, False, True, False]])
def test_drafts_are_what_the_reference_unrolls(pattern, monkeypatch):
    """Also those after steps without drafts, whose features the head reads later."""
    from dynamo_lm.decoding.sequential import SequentialDrafter

    model, seen, turns = eagle(), [], itertools.cycle(pattern)
    plain = SequentialDrafter.draft
    monkeypatch.setattr(AdaptiveDraftLength, "rests", lambda self: not next(turns))
    monkeypatch.setattr(AdaptiveDraftLength, "worth", lambda self, probability, drafts: True)

    def watched(self, row, features, following, text, count, length):
        drafts, proposals, expected = plain(self, row, features, following, text, count, length)
        seen.append(((seen[-1][0] + following) if seen else row.tokens + following[-1:], drafts))
        assert text.tolist() == seen[-1][0]
        return drafts, proposals, expected

    monkeypatch.setattr(SequentialDrafter, "draft", watched)
    model.generate(torch.tensor([[4, 8, 15, 16, 23, 42]]), max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert len(seen) > 3
    for tokens, drafts in seen:
        certain = len(tokens)
        for draft in drafts:  # position certain - 2 is the last whose features are known
            step = len(tokens) - certain + 1
            state = reference_states(model, tokens, step)[certain - 2, step]
            assert draft == int((model.output_weight().double() @ state).argmax())
            tokens = [*tokens, draft]


def test_sampled_text_has_the_bases_distribution():
    model, prompt, rows = eagle(tied=True), torch.tensor([[4, 8, 15]]), 500
    model.base.lm_head.weight.data.mul_(0.5)
    out = model.generate(prompt.repeat(rows, 1), max_new_tokens=3, do_sample=True, top_k=4, seed=0, eos_token_id=None)
    torch.manual_seed(0)
    alone = model.base.generate(prompt.repeat(rows, 1), max_new_tokens=3, do_sample=True, top_k=4, eos_token_id=None)
    for place in (3, 4, 5):
        ours, theirs = (torch.bincount(x[:, place], minlength=VOCABULARY) / rows for x in (out, alone))
        assert (ours - theirs).abs().sum() / 2 < 0.12


def test_a_budget_accepts_drafts_as_long_as_their_regret_is_within_it():
    model, prompt = eagle(), torch.tensor([[4, 8, 15, 16]])
    how = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    strict, budget = (model.generate(prompt, verify=verify, **how) for verify in ("strict", 1.5))
    assert sum(budget.statistics[0].accepted) > sum(strict.statistics[0].accepted)
    log_probs = model.base(budget.sequences).logits[0, 3:-1].double().log_softmax(-1)  # of the 24 tokens written
    regret = log_probs.max(-1).values - log_probs.gather(-1, budget.sequences[0, 4:, None])[:, 0]
    assert regret.sum() > 0 and (regret.cumsum(0) <= 1.5 * torch.arange(1, 25) + 1e-4).all()
    assert budget.statistics[0].regret == pytest.approx(regret.sum().item(), abs=1e-3)


def test_what_a_sequential_head_cannot_do_says_so():
    model = eagle()
    for options, message in (
        ({"verify": "off"}, "joint of parallel heads"),
        ({"tree": 4}, "drafts chains"),
        ({"compile": True}, "compile=True does not know"),
    ):
        with pytest.raises(InputError, match=message):
            model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, eos_token_id=None, **options)
    with pytest.raises(InputError, match="takes 7 or more, and the base has 6"):
        DynaMoForCausalLM.from_base(copy.deepcopy(_base(6, 2, False)), head="eagle3")
    with pytest.raises(InputError, match="leave out layers_per_head"):
        DynaMoForCausalLM.from_base(copy.deepcopy(_base(8, 2, False)), head="eagle3", layers_per_head=2)


def test_a_folder_of_heads_opens_again(tmp_path):
    model = eagle(draft_vocab_size=20)
    model.base.save_pretrained(tmp_path / "base")
    model.config.base_name_or_path = str(tmp_path / "base")
    model.save_pretrained(str(tmp_path / "heads"), weights="heads")
    again = DynaMoForCausalLM.from_pretrained(str(tmp_path / "heads"))
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6]])
    assert again.config.sequential
    assert torch.equal(model.logits(tokens), again.logits(tokens))


def test_a_head_that_is_not_confident_drafts_less_and_the_text_is_the_same(monkeypatch):
    model, prompt = eagle(), torch.tensor([[4, 8, 15, 16]])
    model.base.lm_head.weight.data.mul_(20)  # some tokens are likely now
    how = {"max_new_tokens": 40, "do_sample": False, "tree": 0, "eos_token_id": None, "return_dict_in_generate": True}
    runs = []
    for least in (0.0, 0.9, 2.0):
        monkeypatch.setattr(sequential, "LEAST_CONFIDENCE", least)
        runs.append(model.generate(prompt, **how))
    drafted = [sum(run.statistics[0].proposed) for run in runs]
    assert drafted[0] > drafted[1] > drafted[2] == 0
    assert torch.equal(runs[0].sequences, runs[1].sequences) and torch.equal(runs[0].sequences, runs[2].sequences)


def test_whether_drafting_pays_is_measured_and_never_changes_the_text(monkeypatch):
    model, prompt = eagle(), torch.tensor([[4, 8, 15, 16]])
    how = {"max_new_tokens": 60, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    always = model.generate(prompt, tree=0, **how)
    worthless = AdaptiveDraftLength((1, 2, 3, 4), 4, {size: deque([1.0 + size] * WINDOW) for size in range(5)})
    monkeypatch.setitem(model.runtime.draft_lengths, (True, 4, torch.get_num_threads(), model.device), worthless)
    measured = model.generate(prompt, **how)
    assert torch.equal(always.sequences, measured.sequences)
    assert 0 == sum(measured.statistics[0].proposed) < sum(always.statistics[0].proposed)
