"""The loss against the base's own distribution over a draft vocabulary, the feature cache and the expected acceptance."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_training import FROZEN, ROWS, VOCABULARY, assert_same, gradients, log_of, pack, tiny

from dynamo_lm.backbone.last_layer import last_layer_only
from dynamo_lm.data.packing import Blocks, WholeBlocks
from dynamo_lm.errors import InputError
from dynamo_lm.model.above_stem import AboveStem
from dynamo_lm.model.coupling import add_coupling
from dynamo_lm.training.feature_cache import FeatureCache, stem_states
from dynamo_lm.training.loss import heads_loss, loss_vocabulary
from dynamo_lm.training.trainer import train
from dynamo_lm.training.validation import Acceptance, validate

BATCH = pack(*ROWS)
DOCUMENTS = [document for row in ROWS for document in row]


def plain_loss(model, kl: float, ids: list[int]) -> list[torch.Tensor]:
    """Sums by head, a document and a position at a time, by torch's own losses; after them, those of corrected logits."""
    n = model.num_heads
    sums = [torch.zeros(()) for _ in range(2 * n - 1)]
    for document in DOCUMENTS:
        hidden = model.hidden(torch.tensor([document]))[:, 0]
        logits = [model.readout(hidden[i][None], i + 1)[0].float() for i in range(n)]
        for head in range(2, n + 1):
            for t in range(len(document) - head):
                target = document[t + head]
                teacher = logits[0][t + head - 1, ids].detach().log_softmax(-1)
                lines = [(head - 1, logits[head - 1][t, ids])]
                if model.coupling is not None:
                    state, before = hidden[head - 1, t].detach(), torch.tensor(document[t + head - 1])
                    shift = model.output_weight(head).detach() @ model.coupling.hidden_correction(head, state, before)
                    lines.append((n + head - 2, (logits[head - 1][t].detach() + shift)[ids]))
                for line, of_head in lines:
                    logq = of_head.log_softmax(-1)
                    loss = kl * torch.nn.functional.kl_div(logq, teacher, log_target=True, reduction="sum")
                    if target in ids:
                        loss = loss - (1 - kl) * logq[ids.index(target)]
                    sums[line] = sums[line] + loss
    return sums if model.coupling is not None else sums[:n]


@settings(max_examples=12, deadline=None)
@given(
    kl=st.sampled_from([0.0, 0.3, 1.0]),
    size=st.integers(2, VOCABULARY),
    kind=st.sampled_from(["llama", "gpt_neox", "gemma3"]),
    coupled=st.booleans(),
    chunk=st.sampled_from([5, 512]),
    seed=st.integers(0, 99),
)
def test_losses_and_gradients_are_those_of_a_loop_over_positions(kl, size, kind, coupled, chunk, seed):
    model = tiny(kind, seed=seed)
    if coupled:
        add_coupling(model, 3)
        torch.nn.init.normal_(model.coupling.ups[0])
    ids = sorted(np.random.default_rng(seed).permutation(VOCABULARY)[:size].tolist())
    vocabulary = None if size == VOCABULARY else torch.tensor(ids)
    model.freeze_base()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dynamo_lm.training.loss.CHUNK", chunk)
        found = heads_loss(model, **BATCH, options=replace(FROZEN, kl=kl), vocabulary=vocabulary)
    of_loss = gradients(model)
    sums = plain_loss(model, kl, ids)
    assert found.tolist() == pytest.approx([float(each.detach()) for each in sums], rel=2e-4, abs=2e-4)
    model.zero_grad()
    counts = [sum(max(0, len(document) - head) for document in DOCUMENTS) for head in range(1, 4)]
    weights = (*counts, *counts[1:])
    sum(each / max(count, 1) for each, count in zip(sums, weights, strict=False) if each.requires_grad).backward()
    expected = {name: value for name, value in gradients(model).items() if not name.startswith("base.")}
    assert_same(of_loss, expected, 2e-4)


def test_the_vocabulary_is_the_commonest_tokens_that_cover_the_share():
    counts = torch.tensor([5, 0, 50, 40, 5])
    assert loss_vocabulary(counts, 0.9).tolist() == [2, 3]
    assert loss_vocabulary(counts, 0.91).tolist() == [0, 2, 3]
    assert loss_vocabulary(counts, 1.0) is None
    assert loss_vocabulary(torch.zeros(5), 0.5) is None


@pytest.mark.parametrize("name", ["kl", "loss_vocabulary"])
def test_shares_out_of_range_are_refused(name):
    with pytest.raises(InputError, match=f"{name} is 1.5"):
        replace(FROZEN, **{name: 1.5})


# --- stem states ----------------------------------------------------------------


def conversations(seed: int = 0, documents: int = 9) -> WholeBlocks:
    random = np.random.default_rng(seed)
    texts = [random.integers(0, VOCABULARY, size=size) for size in random.integers(4, 12, size=documents)]
    offsets = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    answers = np.concatenate([np.arange(len(text)) >= 2 for text in texts])
    store = SimpleNamespace(
        tokens=np.concatenate(texts), offsets=offsets, responses=answers, fingerprint=f"{seed}", __len__=lambda: documents
    )
    return WholeBlocks(store, np.arange(documents), 16, seed=seed)


@pytest.mark.parametrize("kind", ["gpt_neox", "gpt2", "opt", "llama", "gemma3"])
def test_heads_above_stored_stem_states_say_what_heads_of_the_whole_model_say(kind):
    model = tiny(kind)
    blocks = conversations()
    batch = blocks.batch(0, 2)
    stem = stem_states(model, batch, bf16=False)
    expected = heads_loss(model, **batch)
    found = heads_loss(model, **batch, stem=stem, above=AboveStem(model))
    assert found.tolist() == pytest.approx(expected.tolist(), rel=0.03)  # bfloat16 states


def test_the_shortened_base_shares_every_parameter_and_leaves_the_base_as_it_is():
    model = tiny("llama")
    before = len(list(model.base.modules()))
    short, _ = last_layer_only(model.base)
    own = {id(p) for p in model.base.parameters()}
    assert {id(p) for p in short.parameters()} <= own and len(list(model.base.modules())) == before


def test_training_from_the_cache_takes_the_steps_of_training_without_it_and_computes_each_stem_once(tmp_path, monkeypatch):
    from dynamo_lm.training import feature_cache

    calls = []
    original = feature_cache.stem_states
    monkeypatch.setattr(
        feature_cache,
        "stem_states",
        lambda model, batch, **kw: calls.append(len(batch["tokens"])) or original(model, batch, **kw),
    )
    options = replace(FROZEN, steps=8, batch_size=2, lr_m=1e-3)
    plain, cached = tiny("llama"), tiny("llama")
    train(plain, conversations(), None, options, tmp_path / "plain")
    blocks = conversations()
    features = FeatureCache(tmp_path / "cache", cached, blocks, limit_bytes=10**6, bf16=False)
    calls.clear()
    train(cached, blocks, None, options, tmp_path / "cached", features=features)
    assert sum(calls) == blocks.num_blocks()
    for one, other in zip(log_of(tmp_path / "plain"), log_of(tmp_path / "cached"), strict=True):
        assert one["losses"] == pytest.approx(other["losses"], rel=0.03)
    calls.clear()
    again = FeatureCache(tmp_path / "cache", cached, blocks, limit_bytes=10**6, bf16=False)
    calls.clear()
    again.states_of([0, 1], blocks.rows([0, 1]))
    assert not calls


def test_a_small_cache_keeps_what_fits(tmp_path):
    model, blocks = tiny("llama"), conversations()
    cache = FeatureCache(tmp_path, model, blocks, limit_bytes=2 * 16 * 16 * 2, bf16=False)
    for _ in range(2):
        states = cache.states_of([0, 1, 2, 3], blocks.rows([0, 1, 2, 3]))
        assert torch.equal(states, stem_states(model, blocks.rows([0, 1, 2, 3]), bf16=False))
    cache.save()
    assert cache.done.sum() == 2 and (tmp_path / "states.bin").stat().st_size == 2 * 16 * 16 * 2


def test_a_cache_of_other_data_or_of_running_text_is_refused(tmp_path):
    model, blocks = tiny("llama"), conversations()
    FeatureCache(tmp_path, model, blocks, limit_bytes=10**6, bf16=False).save()
    with pytest.raises(InputError, match="another base or other data"):
        FeatureCache(tmp_path, model, conversations(1), limit_bytes=10**6, bf16=False)
    text = SimpleNamespace(tokens=np.arange(40) % VOCABULARY, offsets=np.array([0, 40]), responses=None, fingerprint="text")
    with pytest.raises(InputError, match="running"):
        FeatureCache(tmp_path, model, Blocks(text, np.arange(1), 8, seed=0), limit_bytes=10**6, bf16=False)
    with pytest.raises(InputError, match="freeze the base"):
        cache = FeatureCache(tmp_path / "b", model, blocks, limit_bytes=10**6, bf16=False)
        train(model, blocks, None, replace(FROZEN, lr_b=1e-3), tmp_path / "run", features=cache)


def test_a_damaged_record_and_a_full_disk_are_refused(tmp_path, monkeypatch):
    model, blocks = tiny("llama"), conversations()
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=10))
    with pytest.raises(InputError, match="more than is free"):
        FeatureCache(tmp_path, model, blocks, limit_bytes=10**6, bf16=False)
    monkeypatch.undo()
    FeatureCache(tmp_path, model, blocks, limit_bytes=10**6, bf16=False).save()
    for damaged in ("{", "[]", '{"of": {}}'):
        (tmp_path / "cache.json").write_text(damaged)
        with pytest.raises(InputError, match="is damaged"):
            FeatureCache(tmp_path, model, blocks, limit_bytes=10**6, bf16=False)


# --- expected acceptance ----------------------------------------------------------


@pytest.mark.parametrize("coupled", [False, True])
@torch.no_grad()
def test_acceptance_is_that_of_a_loop_over_positions(coupled):
    model, blocks = tiny("llama"), conversations()
    if coupled:
        add_coupling(model, 3)
        for up in model.coupling.ups:
            torch.nn.init.normal_(up)
    n = model.num_heads
    stands = np.zeros((2, n))
    for index in blocks.documents:
        start, end = blocks.store.offsets[index], blocks.store.offsets[index + 1]
        document, answer = blocks.store.tokens[start:end].tolist(), blocks.store.responses[start:end]
        hidden = model.hidden(torch.tensor([document]))[:, 0]
        for t in range(len(document)):
            if t + n >= len(document) or not all(answer[t + i] for i in range(1, n + 1)):
                continue
            greedy, sampled = 1.0, 1.0
            stands[:, 0] += 1
            for head in range(2, n + 1):
                p = model.readout(hidden[0, t + head - 1][None, None])[0, 0]
                q = model.readout(hidden[head - 1, t][None, None], head)[0, 0]
                if coupled:
                    before = torch.tensor(document[t + head - 1])
                    correction = model.coupling.hidden_correction(head, hidden[head - 1, t], before)
                    q = q + correction @ model.output_weight(head).T
                greedy *= float(p.argmax() == q.argmax())
                sampled *= float(torch.minimum(p.softmax(-1), q.softmax(-1)).sum())
                stands[:, head - 1] += (greedy, sampled)
    expected = stands[:, 1:] / stands[:, :-1]
    found = validate(model, blocks, batch_size=2, bf16=False)[1]
    assert found.greedy == pytest.approx(expected[0].tolist(), rel=1e-5)
    assert found.sampled == pytest.approx(expected[1].tolist(), rel=1e-4)


def test_tokens_per_step_count_a_draft_only_after_those_before_it():
    assert Acceptance.tokens_per_step((0.5, 0.5)) == 1.75
    assert "1.75 tokens per step" in str(Acceptance((0.5, 0.5), (0.4, 0.4)))


def test_validation_writes_the_acceptance_to_the_log(tmp_path):
    model, blocks = tiny("llama"), conversations()
    train(model, blocks, blocks, replace(FROZEN, steps=2, batch_size=2), tmp_path)
    last = log_of(tmp_path)[-1]
    assert last["tokens_per_step"]["greedy"] == pytest.approx(
        Acceptance.tokens_per_step(tuple(last["acceptance"]["greedy"]))
    )
