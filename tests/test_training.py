"""The modified-CLM objective (method.md sections 2 and 6.6), its gradients, the loop around them and the perplexities.

What is believed: a naive loop over positions and log-softmax of `model.logits`, each document run alone, unmasked.
"""

from __future__ import annotations

import json
import math
import signal
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
)

from dynamo_lm import DynaMoForCausalLM
from dynamo_lm.data.packing import Blocks
from dynamo_lm.errors import InputError
from dynamo_lm.model.configuration import MEDUSA
from dynamo_lm.model.loading import skeleton
from dynamo_lm.training import log, loss, step, trainer, validation
from dynamo_lm.training.checkpoints import latest_checkpoint, load_checkpoint
from dynamo_lm.training.loss import heads_loss, target_counts
from dynamo_lm.training.memory_estimate import fitting_accumulation, memory
from dynamo_lm.training.options import TrainingOptions
from dynamo_lm.training.speed import operations_per_token
from dynamo_lm.training.step import learning_rate_factor, parameter_groups
from dynamo_lm.training.trainer import train
from dynamo_lm.training.validation import perplexities

VOCABULARY = 11
PLAIN = TrainingOptions(steps=4, lr_b=1e-3, lr_m=1e-2, lr_mb=2.5e-4, batch_size=4, bf16=False)  # LR_MB / LR_B = 1/4
FROZEN = replace(PLAIN, lr_b=0, lr_mb=0)


def config_of(kind: str, **kwargs):
    common = {"vocab_size": VOCABULARY, "num_hidden_layers": 3, "max_position_embeddings": 64} | kwargs
    llama_like = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32} | common
    match kind:
        case "gpt_neox":
            return GPTNeoXConfig(**llama_like)
        case "gpt2":
            off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
            return GPT2Config(n_embd=16, n_head=2, n_layer=3, n_positions=64, **off, vocab_size=VOCABULARY)
        case "opt":
            sizes = {"hidden_size": 16, "num_attention_heads": 2, "ffn_dim": 32, "word_embed_proj_dim": 8}
            return OPTConfig(**sizes, dropout=0.0, **common)
        case "llama":
            return LlamaConfig(**llama_like, num_key_value_heads=1)
        case "gemma3":  # the last layer, and so every head, sees 4 tokens
            types = ["full_attention", "sliding_attention", "sliding_attention"]
            return Gemma3TextConfig(
                **llama_like, head_dim=8, num_key_value_heads=1, sliding_window=4, layer_types=types, pad_token_id=0
            )
    raise ValueError(kind)


ARCHITECTURES = ("gpt_neox", "gpt2", "opt", "llama", "gemma3")


def tiny(kind: str = "gpt_neox", *, num_heads: int = 3, seed: int = 0, base: dict | None = None, **kwargs):
    """A model small enough to loop over, its weights far enough from 0 that every position matters."""
    torch.manual_seed(seed)
    model = DynaMoForCausalLM.from_base(AutoModelForCausalLM.from_config(config_of(kind, **base or {})), num_heads, **kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def pack(*rows: list[list[int]]) -> dict[str, Tensor]:
    """A batch of blocks, each a list of documents."""
    whole = {"tokens": [], "segments": [], "positions": []}
    for documents in rows:
        whole["tokens"].append([token for document in documents for token in document])
        whole["segments"].append([i for i, document in enumerate(documents) for _ in document])
        whole["positions"].append([t for document in documents for t in range(len(document))])
    return {name: torch.tensor(value) for name, value in whole.items()}


ROWS = (  # blocks of 14; rows have different numbers of targets
    [[3, 1, 4, 1, 5, 9, 2, 6, 5], [3, 5], [8, 9, 7]],
    [[2, 7, 1], [8], [2, 8, 1, 8, 2, 8, 4, 5, 9, 0]],
    [[0], [1], [2], [3], [4], [5], [6], [7], [8], [9], [10], [0, 1, 2]],
    [[1, 6, 1, 8, 0, 3, 3, 9, 8, 8, 7, 4, 9, 8]],
)


def naive_losses(model, rows) -> list[Tensor]:
    """Sum of -log p(x[t+i] | x[1:t]) for head i = 1..n, with gradients: each document alone, a position at a time."""
    sums = [torch.zeros(()) for _ in range(model.num_heads)]
    for document in (document for row in rows for document in row):
        logits = model.logits(torch.tensor([document]))[:, 0].float()  # (n, length, vocabulary)
        for i in range(1, model.num_heads + 1):
            for t in range(len(document) - i):
                sums[i - 1] = sums[i - 1] - torch.log_softmax(logits[i - 1, t], -1)[document[t + i]]
    return sums


def naive_counts(rows, num_heads: int) -> list[int]:
    return [sum(max(0, len(document) - i) for row in rows for document in row) for i in range(1, num_heads + 1)]


def gradients(model) -> dict[str, Tensor]:
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def naive_gradients(model, rows, ratio: float) -> dict[str, Tensor]:
    """The base: head 1's gradient + ratio * that of heads 2..n. Heads 2..n's own parameters: theirs as it is."""
    counts = naive_counts(rows, model.num_heads)
    first, *others = [loss / max(count, 1) for loss, count in zip(naive_losses(model, rows), counts, strict=True)]
    names, parameters = zip(*[(n, p) for n, p in model.named_parameters() if p.requires_grad], strict=True)

    def grad(loss):
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]

    from_first, from_others = grad(first), grad(sum(others))
    base = {id(p) for p in model.base.parameters()}
    return {
        name: one + ratio * rest if id(p) in base else rest
        for name, p, one, rest in zip(names, parameters, from_first, from_others, strict=True)
    }


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    """Equal up to float32 rounding, parameter by parameter, against the largest entry of the expected gradient."""
    for name, value in expected.items():
        scale = max(value.abs().max().item(), 1e-3)  # that of a key's bias is 0 but for rounding
        assert (found[name] - value).abs().max().item() <= tolerance * scale, name


def store_of(*documents) -> SimpleNamespace:
    offsets = np.cumsum([0, *map(len, documents)], dtype=np.int64)
    return SimpleNamespace(tokens=np.concatenate(documents), offsets=offsets, responses=None)


def random_blocks(block_size: int = 12, seed: int = 0) -> Blocks:
    random = np.random.default_rng(seed)
    documents = [random.integers(0, VOCABULARY, size=length) for length in random.integers(1, 20, size=40)]
    return Blocks(store_of(*documents), np.arange(40), block_size, seed=seed)


def log_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# --- the loss -------------------------------------------------------------------


def test_every_target_of_a_model_that_knows_nothing_costs_the_logarithm_of_the_vocabulary():
    model = tiny()
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    # a document of 4 has 3, 2 and 1 targets for heads 1, 2 and 3; one of 2 has 1, 0 and 0; one of 1 has none
    batch = pack([[5, 6, 7, 8], [1, 2], [3]])
    assert target_counts(batch["tokens"], batch["segments"], 3) == [4, 2, 1]
    losses = heads_loss(model, **batch, options=PLAIN)
    assert losses.tolist() == pytest.approx([4 * math.log(11), 2 * math.log(11), 1 * math.log(11)])


def test_head_i_is_scored_on_the_token_i_ahead():
    """Hand-written logits: at position t, head i gives probability 1/2 to x[t+i] and 1/20 to each other token."""
    model = tiny()

    def readout(hidden, head):
        logits = torch.zeros(1, 5, 11)
        for t in range(5 - head):
            logits[0, t, 5 + t + head] = math.log(10)  # e^a / (e^a + 10) = 1/2
        return logits + 0 * hidden.sum()

    model.readout = readout
    losses = heads_loss(model, **pack([[5, 6, 7, 8, 9]]), options=PLAIN)
    assert losses.tolist() == pytest.approx([4 * math.log(2), 3 * math.log(2), 2 * math.log(2)])
    # in two documents, 5 6 7 | 8 9: three targets, one and none are left
    losses = heads_loss(model, **pack([[5, 6, 7], [8, 9]]), options=PLAIN)
    assert losses.tolist() == pytest.approx([3 * math.log(2), 1 * math.log(2), 0])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_packed_documents_cost_what_they_cost_alone(kind, attention):
    model = tiny(kind)
    model.set_attn_implementation(attention)
    with torch.no_grad():
        expected = [loss.item() for loss in naive_losses(model, ROWS)]
    assert target_counts(**{k: pack(*ROWS)[k] for k in ("tokens", "segments")}, num_heads=3) == naive_counts(ROWS, 3)
    assert heads_loss(model, **pack(*ROWS), options=PLAIN).tolist() == pytest.approx(expected, rel=1e-5)


def test_without_options_the_losses_come_without_gradients():
    model = tiny()
    with torch.no_grad():
        expected = [loss.item() for loss in naive_losses(model, ROWS)]
    assert heads_loss(model, **pack(*ROWS)).tolist() == pytest.approx(expected, rel=1e-5)
    assert all(p.grad is None for p in model.parameters())


def test_bf16_losses_and_gradients_are_near_those_of_float32():
    model = tiny()
    batch = pack(*ROWS)
    full = heads_loss(model, **batch, options=PLAIN)
    expected = gradients(model)
    model.zero_grad(set_to_none=True)
    half = heads_loss(model, **batch, options=replace(PLAIN, bf16=True))
    assert half.dtype == torch.float32 and half.tolist() == pytest.approx(full.tolist(), rel=0.02)
    assert half.tolist() != full.tolist()  # it did run in another precision
    ours, theirs = (torch.cat([g.flatten() for g in found.values()]) for found in (gradients(model), expected))
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.99
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)


# --- the gradients --------------------------------------------------------------


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_gradients_are_those_of_the_weighted_sum_of_the_heads_losses(kind):
    model = tiny(kind)
    expected = naive_gradients(model, ROWS, ratio=0.25)
    heads_loss(model, **pack(*ROWS), options=PLAIN)
    assert_same(gradients(model), expected)


VARIANTS = {
    "own output embedding": {"own_output_embedding": True},
    "medusa": MEDUSA,
    "own output embedding only, last": {"own_output_embedding": True, "layers_per_head": 0, "feed": "last"},
    "adapter": {"adapter_rank": 2},
    "two layers": {"layers_per_head": 2},
    "fed by the last layer": {"feed": "last"},
    "copied layer, tied base": {"init": "copy", "base": {"tie_word_embeddings": True}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_of_the_variants(variant):
    model = tiny(**VARIANTS[variant])
    expected = naive_gradients(model, ROWS, ratio=0.25)
    heads_loss(model, **pack(*ROWS), options=PLAIN)
    assert_same(gradients(model), expected)


@pytest.mark.parametrize("kwargs", [{}, {"own_output_embedding": True}, {"adapter_rank": 2}, MEDUSA], ids=str)
def test_without_lr_mb_the_base_gets_the_gradient_of_head_1_alone(kwargs):
    model = tiny(**kwargs)
    expected = naive_gradients(model, ROWS, ratio=0.0)
    heads_loss(model, **pack(*ROWS), options=replace(PLAIN, lr_mb=0))
    assert_same(gradients(model), expected)


@pytest.mark.parametrize("chunk", [1, 5, 14, 56])
def test_gradients_and_losses_do_not_depend_on_the_chunk(chunk, monkeypatch):
    model = tiny(own_output_embedding=True)
    expected = naive_gradients(model, ROWS, ratio=0.25)
    losses = [loss.item() for loss in naive_losses(model, ROWS)]
    monkeypatch.setattr(loss, "CHUNK", chunk)
    assert heads_loss(model, **pack(*ROWS), options=PLAIN).tolist() == pytest.approx(losses, rel=1e-5)
    assert_same(gradients(model), expected)


@pytest.mark.parametrize("kwargs", [{}, {"own_output_embedding": True}, {"adapter_rank": 2}, MEDUSA], ids=str)
@pytest.mark.parametrize("parts", [2, 4])
def test_a_batch_in_parts_gives_the_gradients_of_the_whole(parts, kwargs):
    """The parts have different numbers of targets (the third row has 2 for head 1, the fourth 13)."""
    model = tiny(**kwargs)
    batch = pack(*ROWS)
    counts = target_counts(batch["tokens"], batch["segments"], 3)
    whole = heads_loss(model, **batch, options=PLAIN, counts=counts)
    expected = gradients(model)
    model.zero_grad(set_to_none=True)
    sums = sum(heads_loss(model, **part, options=PLAIN, counts=counts) for part in step._split(batch, parts))
    assert sums.tolist() == pytest.approx(whole.tolist(), rel=1e-5)
    assert_same(gradients(model), expected)


def test_a_batch_without_a_target_for_the_last_head_is_no_error():
    model = tiny()
    losses = heads_loss(model, **pack([[1, 2], [3, 4]]), options=PLAIN)
    assert losses[0] > 0 and losses[1:].tolist() == [0, 0]
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("learn", [True, False])
def test_logits_exist_for_one_chunk_of_one_head_at_a_time(learn, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", 5)
    monkeypatch.setattr(validation, "CHUNK", 5)
    model = tiny()
    shapes, alive, most = [], weakref.WeakSet(), 0
    embedding = model.get_output_embeddings()

    def record(module, args, output):
        nonlocal most
        shapes.append(tuple(output.shape))
        most = max(most, len(alive))
        alive.add(output)

    embedding.register_forward_hook(record)
    if learn:
        heads_loss(model, **pack(*ROWS), options=PLAIN)
        assert len(shapes) == 3 * 12  # ceil(4 * 14 / 5) chunks for each head
    else:
        perplexities(model, random_blocks(), batch_size=8, bf16=False)
    assert shapes and all(rows == 1 and positions <= 5 for rows, positions, _ in shapes)
    assert most <= 1  # the chunk before, until the name is bound again


# --- a frozen base --------------------------------------------------------------


@pytest.mark.parametrize("kwargs", [{}, {"own_output_embedding": True}, {"adapter_rank": 2}, MEDUSA], ids=str)
def test_a_frozen_base_gets_no_gradient_and_head_1_no_loss(kwargs):
    model = tiny(**kwargs).freeze_base()
    base = {id(p) for p in model.base.parameters()}
    expected = naive_gradients(model, ROWS, ratio=0.25)
    heads_read = []
    readout = model.readout
    model.readout = lambda hidden, head=1: heads_read.append(head) or readout(hidden, head)
    losses = heads_loss(model, **pack(*ROWS), options=FROZEN)
    assert losses[0] == 0 and (losses[1:] > 0).all() and heads_read == [2, 3]
    assert all(p.grad is None for p in model.base.parameters())
    assert_same(gradients(model), expected)
    assert {id(p) for g in parameter_groups(model, FROZEN) for p in g["params"]}.isdisjoint(base)


@pytest.mark.parametrize("kind", ["gpt_neox", "gemma3"])
def test_a_frozen_base_is_bit_identical_after_training_and_its_dropout_is_off(kind, tmp_path):
    dropout = {"attention_dropout": 0.1} | ({"hidden_dropout": 0.1} if kind == "gpt_neox" else {})
    model = tiny(kind, base=dropout)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    modes = []
    train(
        model,
        random_blocks(),
        random_blocks(seed=1),
        replace(FROZEN, validate_every=2),
        tmp_path,
        report=lambda progress: modes.append((model.base.training, model.heads.training)),
    )
    assert modes == [(False, True)] * 4 and not model.training
    for name, p in model.state_dict().items():
        assert torch.equal(p, before[name]) == name.startswith("base."), name
    assert all(line["losses"][0] == 0 for line in log_of(tmp_path))


def test_a_frozen_base_with_heads_that_are_all_readout_needs_no_backward_through_the_model(monkeypatch):
    model = tiny(**MEDUSA).freeze_base()
    hidden = model.hidden
    model.hidden = lambda *args, **kwargs: (states := hidden(*args, **kwargs), seen.append(states.requires_grad))[0]
    seen: list[bool] = []
    heads_loss(model, **pack(*ROWS), options=FROZEN)
    assert seen == [False]
    assert all(p.grad is not None and p.grad.any() for p in model.heads.parameters())


# --- learning -------------------------------------------------------------------


@pytest.mark.parametrize("options", [PLAIN, FROZEN], ids=["three rates", "frozen"])
@pytest.mark.parametrize("kind", ["gpt_neox", "gemma3"])
def test_every_head_learns_a_periodic_text_by_heart(kind, options, tmp_path):
    model = tiny(kind, num_heads=4, base={"tie_word_embeddings": False})
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(5)  # a frozen random readout must be able to be sure of a token
    period = np.tile([3, 1, 4, 2, 7], 40)  # each token determines all that follow
    blocks = Blocks(store_of(period[:100], period[:97], period[:55]), np.arange(3), 16, seed=0)
    options = replace(options, steps=60, lr_b=options.lr_b and 1e-2, lr_mb=options.lr_mb and 2.5e-3)
    train(model, blocks, None, options, tmp_path)
    first, last = (log_of(tmp_path)[i]["losses"] for i in (0, -1))
    for head in range(1 if options.frozen else 0, 4):
        assert first[head] > 1 and last[head] < 0.05, (first, last)


def test_accumulation_takes_the_same_steps(tmp_path):
    logs = []
    for accumulation in (1, 4):
        folder = tmp_path / str(accumulation)
        train(tiny(), random_blocks(), None, replace(PLAIN, accumulation=accumulation), folder)
        logs.append(log_of(folder))
    for one, four in zip(*logs, strict=True):
        assert one["losses"] == pytest.approx(four["losses"], rel=1e-4)
        assert one["gradient_norm"] == pytest.approx(four["gradient_norm"], rel=1e-3)


def test_a_step_moves_the_base_at_lr_b_and_the_heads_at_lr_m(tmp_path):
    """AdamW's first step is the learning rate times the gradient's sign, where the gradient is not tiny."""
    model = tiny()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, random_blocks(), None, replace(PLAIN, steps=1, weight_decay=0), tmp_path)
    for name, p in model.named_parameters():
        rate = 1e-3 if name.startswith("base.") else 1e-2
        assert (p - before[name]).abs().max().item() == pytest.approx(rate, rel=0.02), name


def test_learning_rate_factor_rises_linearly_and_falls_as_a_cosine():
    # 100 steps, of which 10 % are warm-up: 10 rising, 90 falling
    assert learning_rate_factor(0, 100, 0.1) == pytest.approx(0.1)
    assert learning_rate_factor(4, 100, 0.1) == pytest.approx(0.5)
    assert learning_rate_factor(9, 100, 0.1) == 1.0
    assert learning_rate_factor(10, 100, 0.1) == 1.0
    assert learning_rate_factor(40, 100, 0.1) == pytest.approx(0.75)  # a third of the way: (1 + cos 60°) / 2
    assert learning_rate_factor(55, 100, 0.1) == pytest.approx(0.5)  # half-way
    assert learning_rate_factor(70, 100, 0.1) == pytest.approx(0.25)
    assert learning_rate_factor(99, 100, 0.1) == pytest.approx(0.000305, abs=1e-6)
    assert learning_rate_factor(100, 100, 0.1) == pytest.approx(0)
    # no warm-up, a single step, the paper's 1 % of 75,782
    assert learning_rate_factor(0, 100, 0.0) == learning_rate_factor(0, 1, 0.01) == 1.0
    assert learning_rate_factor(757, 75_782, 0.01) == 1.0 > learning_rate_factor(756, 75_782, 0.01)


def test_the_learning_rates_of_a_run_follow_the_factor(tmp_path):
    train(tiny(), random_blocks(), None, replace(PLAIN, warmup=0.5), tmp_path)
    # 4 steps, 2 of warm-up: 1/2, 1, then the cosine at 0 and at 1/2
    assert [line["lr_factor"] for line in log_of(tmp_path)] == pytest.approx([0.5, 1, 1, 0.5])


@pytest.mark.parametrize("kwargs", [{}, {"own_output_embedding": True}, {"adapter_rank": 2}, MEDUSA], ids=str)
def test_parameter_groups_hold_every_parameter_once_at_its_rate(kwargs):
    model = tiny(**kwargs)
    rates = {}
    for group in parameter_groups(model, PLAIN):
        for p in group["params"]:
            assert id(p) not in rates
            rates[id(p)] = (group["lr"], group["weight_decay"])
    assert len(rates) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        rate = 1e-3 if name.startswith("base.") else 1e-2
        assert rates[id(p)] == (rate, 0.01 if p.ndim == 2 else 0), name


# --- perplexities ---------------------------------------------------------------


def test_perplexities_of_a_model_that_knows_nothing_are_the_size_of_the_vocabulary():
    model = tiny()
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    found = perplexities(model, random_blocks(), batch_size=4, bf16=False)
    assert (*found.heads, *found.joint) == pytest.approx((11,) * 6)


@pytest.mark.parametrize("kind", ["gpt_neox", "gemma3"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_perplexities_are_those_of_a_loop_over_the_positions_that_have_all_targets(kind, batch_size):
    model, blocks, n = tiny(kind), random_blocks(), 3
    nlls: list[list[float]] = []  # one entry a position t: -log f_i(x[t+i]) for i = 1..n
    with torch.no_grad():
        for tokens, segments, _ in (blocks.block(0, index) for index in range(7)):
            for piece in range(segments.max() + 1):
                document = torch.from_numpy(tokens[segments == piece])
                log_f = torch.log_softmax(model.logits(document[None])[:, 0], -1)
                for t in range(len(document) - n):
                    nlls.append([-log_f[i - 1, t, document[t + i]].item() for i in (1, 2, 3)])
    total = len(nlls)
    ppl = [math.exp(sum(nll[i] for nll in nlls) / total) for i in range(n)]
    joint = [math.exp(sum(sum(nll[:m]) for nll in nlls) / (m * total)) for m in (1, 2, 3)]  # 1 / (n T)
    found = perplexities(model.train(), blocks, batch_size=batch_size, bf16=False, limit=7)
    assert found.heads == pytest.approx(ppl, rel=1e-5) and found.joint == pytest.approx(joint, rel=1e-5)
    assert found.joint[0] == pytest.approx(found.heads[0])
    assert found.joint[2] == pytest.approx((ppl[0] * ppl[1] * ppl[2]) ** (1 / 3), rel=1e-5)
    assert model.training  # as it was


def test_perplexities_of_a_diverged_model_are_infinite_rather_than_an_error():
    model = tiny()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e5)  # thousands of nats
    assert math.isinf(perplexities(model, random_blocks(), batch_size=4, bf16=False).heads[0])


def test_validation_without_a_long_enough_document_is_refused():
    blocks = Blocks(store_of([1, 2, 3], [4, 5, 6]), np.arange(2), 6, seed=0)
    with pytest.raises(InputError, match="no document with as many tokens"):
        perplexities(tiny(num_heads=4), blocks, batch_size=4, bf16=False)


def test_validation_happens_on_schedule_and_at_the_end_and_changes_no_step(tmp_path):
    options = replace(PLAIN, steps=5, validate_every=2)
    base = {"hidden_dropout": 0.1}
    torch.manual_seed(1)
    last = train(tiny(base=base), random_blocks(), random_blocks(seed=1), options, tmp_path / "with")
    train(tiny(base=base), random_blocks(), None, options, tmp_path / "without")
    lines = log_of(tmp_path / "with")
    assert [line["step"] for line in lines if "ppl" in line] == [2, 4, 5]
    assert tuple(lines[-1]["ppl"]) == last.heads and tuple(lines[-1]["ppl_joint"]) == last.joint
    assert [line["losses"] for line in lines] == [line["losses"] for line in log_of(tmp_path / "without")]


# --- what goes wrong ------------------------------------------------------------


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_stops_the_run_and_moves_nothing(where, tmp_path, monkeypatch):
    calls = 0

    def poisoned(model, *args, **kwargs):
        nonlocal calls
        calls += 1
        sums = heads_loss(model, *args, **kwargs)
        if calls == 3 and where == "loss":
            return sums * math.nan
        if calls == 3:
            next(model.heads.parameters()).grad.view(-1)[0] = math.inf
        return sums

    monkeypatch.setattr(step, "heads_loss", poisoned)
    model, options = tiny(), replace(PLAIN, checkpoint_every=1)
    with pytest.raises(InputError, match=r"step 3 .*blocks 8 to 11 .*step-00000002"):
        train(model, random_blocks(), None, options, tmp_path)
    assert [line["step"] for line in log_of(tmp_path)] == [1, 2]
    other = tiny(seed=1)
    optimizer = torch.optim.AdamW(parameter_groups(other, options))
    assert load_checkpoint(latest_checkpoint(tmp_path), other, optimizer, options) == 2
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_poisoned_weight_is_found_at_the_first_step(tmp_path):
    model = tiny()
    with torch.no_grad():
        model.heads[1].layers[0].mlp.dense_h_to_4h.weight[0, 0] = math.nan
    with pytest.raises(InputError, match="step 1 is not finite"):
        train(model, random_blocks(), None, PLAIN, tmp_path)


def test_learning_rates_that_blow_up_are_reported(tmp_path):
    options = replace(PLAIN, steps=20, lr_b=1e30, lr_m=1e30, lr_mb=1e30, clip=0)
    with pytest.raises(InputError, match=r"step \d+ is not finite"):
        train(tiny(), random_blocks(), None, options, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"batch_size": 0},
        {"keep": 0},
        {"checkpoint_minutes": 0.0},
        {"checkpoint_minutes": math.nan},
        {"lr_m": -1.0},
        {"lr_b": math.nan},
        {"weight_decay": -0.1},
        {"accumulation": 3},
        {"lr_b": 0.0},  # lr_mb is left positive
    ],
    ids=str,
)
def test_options_without_meaning_are_refused_by_name(change):
    with pytest.raises(InputError, match=next(iter(change))):
        replace(PLAIN, **change)


@pytest.mark.parametrize("num_heads, lr_m", [(1, 1e-3), (3, 0.0)])
def test_a_run_that_would_train_nothing_is_refused(num_heads, lr_m, tmp_path):
    with pytest.raises(InputError, match="nothing to train"):
        train(tiny(num_heads=num_heads), random_blocks(), None, replace(FROZEN, lr_m=lr_m), tmp_path)


def test_a_loss_vocabulary_is_refused_for_heads_that_would_draft_the_rest_unlearned(tmp_path):
    with pytest.raises(InputError, match="--loss-vocabulary 1"):
        train(tiny(**MEDUSA), random_blocks(), None, replace(FROZEN, loss_vocabulary=0.9), tmp_path)


def test_a_second_interrupt_stops_at_once_and_the_handler_is_put_back():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    inherited = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
    before = [signal.getsignal(number) for number in numbers]
    for number in numbers:
        with pytest.raises(KeyboardInterrupt), trainer._stop_between_steps() as stopped:
            signal.raise_signal(number)
            assert len(stopped) == 1
            signal.raise_signal(number)
        assert [signal.getsignal(number) for number in numbers] == before
    signal.signal(signal.SIGHUP, inherited)


def test_a_run_that_outlives_its_terminal_goes_on():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup sets it
    try:
        with trainer._stop_between_steps() as stopped:
            signal.raise_signal(signal.SIGHUP)
            assert not stopped
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_new_run_keeps_the_log_of_one_that_had_no_checkpoint_yet(tmp_path):
    for text in ('{"step": 1}\n', '{"step": 2}\n'):
        (tmp_path / "log.jsonl").write_text(text, encoding="utf-8")
        with log._Log(tmp_path, 0):
            pass
    logs = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.glob("log*.jsonl")}
    assert logs == {"log.jsonl": "", "log-1.jsonl": '{"step": 1}\n', "log-2.jsonl": '{"step": 2}\n'}


def test_a_resumed_run_drops_the_steps_after_its_checkpoint_and_a_torn_line(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st', encoding="utf-8")
    with log._Log(tmp_path, 2):
        pass
    assert (tmp_path / "log.jsonl").read_text(encoding="utf-8") == '{"step": 1}\n{"step": 2}\n'


def test_memory_of_a_mixture_of_experts_is_estimated_though_it_does_not_run_without_numbers():
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    config = MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, num_local_experts=4)
    with torch.device("meta"):
        model = DynaMoForCausalLM.from_base(skeleton(config), 3)
    assert memory(model, FROZEN, 64, fused=False)["activations"] > 4 * 64 * 32 * 4  # of one state of 4 blocks
    assert fitting_accumulation(model, FROZEN, 64, fused=False) == 1
    assert fitting_accumulation(model, FROZEN, 100_000, fused=False) == 4  # one block at a time


@pytest.mark.parametrize(
    "options", [PLAIN, FROZEN, replace(PLAIN, activation_checkpointing=True)], ids=["full", "frozen", "checkpointed"]
)
@pytest.mark.parametrize("kwargs", [{}, {"own_output_embedding": True}], ids=["", "own output"])
def test_the_arithmetic_of_a_token_is_what_a_step_computes(options, kwargs):
    base = {"hidden_size": 64, "intermediate_size": 256}  # wide, so that norms and attention weigh little
    model, batch = tiny("llama", base=base, **kwargs), pack([[1, 2, 3, 4] * 4])
    taken = step.Optimization(model, random_blocks(), options)
    with FlopCounterMode(display=False) as counted:
        taken.gradients(0, batch)
    assert operations_per_token(model, options, 16) * 16 == pytest.approx(counted.get_total_flops(), rel=0.06)
