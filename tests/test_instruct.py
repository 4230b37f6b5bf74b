"""Conversations: their forms, which tokens are learned, packing, the masked objective, filtering and self-distillation.

What is believed: rendered text cut by hand, and naive loops over positions.
"""

from __future__ import annotations

import json
import math
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from architectures import cycle, markov_dynamo
from commandline import END, byte_tokenizer, neox
from hypothesis import given, settings
from hypothesis import strategies as st
from test_training import FROZEN, PLAIN, tiny

from dynamo_lm import DynaMoForCausalLM
from dynamo_lm.cooccurrence.counting import count
from dynamo_lm.cooccurrence.table import Cooccurrence
from dynamo_lm.data.chat_template import chat_template, encode_chat, end_of_turn, render
from dynamo_lm.data.conversations import conversations, messages
from dynamo_lm.data.packing import Blocks, WholeBlocks, targets
from dynamo_lm.data.token_store import TokenStore
from dynamo_lm.data.tokenize_chat import encode, tokenize_conversations
from dynamo_lm.errors import InputError
from dynamo_lm.evaluation.judges.filter import best, scores, turns
from dynamo_lm.training.answer_table import add_answers, answers
from dynamo_lm.training.lora import TrunkLora
from dynamo_lm.training.loss import heads_loss, target_counts
from dynamo_lm.training.self_distill import BatchAnswerer, EndpointAnswerer, distill, repeated
from dynamo_lm.training.validation import perplexities, scored_positions

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FORGETFUL = (  # as Qwen3: a thought stands before the last answer only
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ 'A:' }}{% if loop.last %}{{ '(hm)' }}{% endif %}"
    "{{ message['content'] + eos_token }}{% else %}{{ 'U:' + message['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
)
ENDLESS = (
    "{% for message in messages %}{{ message['role'][0] + ':' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)


def talk(*said: str) -> list[dict[str, str]]:
    """Turns of user and assistant by turns; a first one that begins with "!" is the system's."""
    system = [{"role": "system", "content": said[0][1:]}] if said[0].startswith("!") else []
    roles = ("user", "assistant")
    return system + [{"role": roles[i % 2], "content": text} for i, text in enumerate(said[len(system) :])]


def tokenizer_with(template: str | None = None, *special: str):
    tokenizer = byte_tokenizer()
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return chat_template(tokenizer, template)


def learned(tokenizer, said) -> list[tuple[str, list[str]]]:
    """(the text, runs of it that are learned) for each document of a conversation."""
    found = []
    for ids, flags in encode(said, tokenizer):
        runs, before = [], False
        for token, flag in zip(ids, flags, strict=True):
            if flag and not before:
                runs.append([])
            if flag:
                runs[-1].append(token)
            before = flag
        found.append((tokenizer.decode(ids), [tokenizer.decode(run) for run in runs]))
    return found


# --- forms ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": talk("!be kind", "hi", "hello")}, talk("!be kind", "hi", "hello")),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                       {"role": "assistant", "content": "c"}]}, talk("ab", "c")),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}], "id": 3},
         talk("hi", "hello")),
        ({"conversation": [{"from": "gpt", "value": "?"}, {"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
         talk("hi", "ho")),
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, talk("Add.\n\n1 2", "3")),
        ({"instruction": "Say a.", "input": "", "output": "a"}, talk("Say a.", "a")),
        ({"instruction": "Who?", "context": "Ann is.", "response": "Ann", "category": "qa"}, talk("Who?\n\nAnn is.", "Ann")),
        ({"prompt": "hi", "response": "hello"}, talk("hi", "hello")),
        ({"prompt": "hi", "completion": "hello", "system": "be kind"}, talk("!be kind", "hi", "hello")),
        ({"prompt": "Below is an instruction that describes a task. Do it.\n\n### Instruction:\nSing.\n\n### Response:\n",
          "response": "la"}, talk("Sing.", "la")),
        ({"prompt": "Below is an instruction.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:", "output": "3"},
         talk("Add.\n\n1 2", "3")),
    ],
)  # fmt: skip
def test_records_are_known_by_their_shape(record, expected):
    assert messages(record, "here") == expected


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"text": "a story"}, "'text'"),
        ({"messages": "hi"}, "not a list"),
        ({"messages": [{"role": "judge", "content": "x"}]}, "'judge'"),
        ({"messages": [{"role": "user", "content": "x"}]}, "nothing to learn"),
        ({"messages": ["x"]}, "not an object"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "other than text"),
        ({"instruction": 3, "output": "x"}, "'instruction'"),
        ({"prompt": "\ud800", "response": "x"}, "surrogate"),
    ],
)
def test_a_record_of_another_shape_is_refused_with_its_place(record, said):
    with pytest.raises(InputError, match="line 7") as refused:
        messages(record, "line 7")
    assert said in str(refused.value)


def test_conversations_come_from_every_kind_of_file(tmp_path):
    import pyarrow
    from pyarrow import parquet

    said = [{"messages": talk("a", "b")}, {"messages": talk("c", "d", "e", "f")}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(one) + "\n" for one in said))
    (tmp_path / "x.json").write_text(json.dumps(said))
    parquet.write_table(pyarrow.Table.from_pylist(said), tmp_path / "x.parquet")
    for name in ("x.jsonl", "x.json", "x.parquet"):
        assert [found for _, found in conversations([str(tmp_path / name)])] == [one["messages"] for one in said]
    (tmp_path / "x.txt").write_text("hello")
    with pytest.raises(InputError, match="plain text"):
        list(conversations([str(tmp_path / "x.txt")]))


# --- which tokens are learned ---------------------------------------------------


def test_the_default_template_needs_no_new_token_and_is_saved_with_the_tokenizer(tmp_path):
    tokenizer = tokenizer_with()
    said = talk("!be kind", "hi", "hello", "bye", "ciao")
    assert render(tokenizer, said) == (
        f"be kind\n\nUser:\nhi\n\nAssistant:\nhello{END}\n\nUser:\nbye\n\nAssistant:\nciao{END}\n\n"
    )
    assert render(tokenizer, said[:2], add_generation_prompt=True) == "be kind\n\nUser:\nhi\n\nAssistant:\n"
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert again.chat_template == tokenizer.chat_template
    assert chat_template(again).chat_template == tokenizer.chat_template
    with pytest.raises(InputError, match='role "tool"'):
        render(tokenizer, [{"role": "tool", "content": "x"}])


def test_a_tokenizer_that_begins_texts_with_a_token_begins_chats_with_it():
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    ids = encode_chat(chat_template(tokenizer), talk("hi"))
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1


def test_every_answer_is_learned_with_the_token_that_ends_it_and_nothing_else():
    tokenizer = tokenizer_with()
    assert learned(tokenizer, talk("!be kind", "the fox", "ran", "and", "saw")) == [
        (
            f"be kind\n\nUser:\nthe fox\n\nAssistant:\nran{END}\n\nUser:\nand\n\nAssistant:\nsaw{END}",
            [f"ran{END}", f"saw{END}"],
        )
    ]


def test_white_space_behind_the_end_of_a_turn_is_not_learned():
    tokenizer = tokenizer_with(CHATML, "<|im_start|>", "<|im_end|>")
    [(text, runs)] = learned(tokenizer, talk("hi", "ho", "he", "ha"))
    assert runs == ["ho<|im_end|>", "ha<|im_end|>"] and text.endswith("ha<|im_end|>")
    assert tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer)) == "<|im_end|>"


def test_a_template_that_ends_no_turn_gets_the_end_of_text():
    tokenizer = tokenizer_with(ENDLESS)
    assert learned(tokenizer, talk("hi", "ho")) == [(f"u:hi\na:ho\n{END}", [f"ho\n{END}"])]
    assert end_of_turn(tokenizer) == tokenizer.eos_token_id


def test_answers_that_a_template_writes_differently_later_are_documents_of_their_own():
    tokenizer = tokenizer_with(FORGETFUL)
    assert learned(tokenizer, talk("hi", "ho", "he", "ha")) == [
        (f"U:hi\nA:(hm)ho{END}", [f"(hm)ho{END}"]),
        (f"U:hi\nA:ho{END}U:he\nA:(hm)ha{END}", [f"(hm)ha{END}"]),
    ]


def test_a_template_that_begins_answers_otherwise_than_it_asks_for_them_is_refused():
    tokenizer = tokenizer_with(ENDLESS.replace("'a:'", "'Answer: '"))
    with pytest.raises(InputError, match="--template"):
        encode(talk("hi", "ho"), tokenizer)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(alphabet="ab \n.é☃<", min_size=1, max_size=12), min_size=2, max_size=6).filter(
        lambda x: len(x) % 2 == 0
    )
)
def test_a_first_answer_follows_exactly_the_tokens_that_generation_is_given(said):
    tokenizer = TOKENIZER
    [(ids, flags)] = encode(talk(*said), tokenizer)
    prompt = encode_chat(tokenizer, talk(*said)[:1])
    begin = flags.index(True)
    whole = "".join(
        ("User:\n" if i % 2 == 0 else "Assistant:\n") + text.strip() + ("" if i % 2 == 0 else END) + "\n\n"
        for i, text in enumerate(said)
    )
    assert tokenizer.decode(ids) == whole.removesuffix("\n\n")
    assert sum(flag for flag, token in zip(flags, ids, strict=True) if token == tokenizer.eos_token_id) == len(said) // 2
    if said[1].strip():
        assert tokenizer.decode(ids[:begin]) == tokenizer.decode(prompt)


TOKENIZER = tokenizer_with()


# --- the store ------------------------------------------------------------------


def store_in(folder, *said, longest=1000, tokenizer=TOKENIZER) -> TokenStore:
    file = folder / "said.jsonl"
    file.write_text("".join(json.dumps({"messages": one}) + "\n" for one in said))
    return tokenize_conversations([str(file)], tokenizer, folder / "tokens", longest=longest)


def test_a_store_knows_what_was_said_by_the_assistant_and_is_reused(tmp_path):
    said = [talk("hi", "ho"), talk("a", "b", "c", "d")]
    store = store_in(tmp_path, *said)
    flat = [encoded for one in said for encoded in encode(one, TOKENIZER)]
    assert [document.tolist() for document in store] == [ids for ids, _ in flat]
    assert store.responses.tolist() == [flag for _, flags in flat for flag in flags]
    assert store.facts == {
        "conversations": 2, "cut": 0, "too_long": 0, "empty": 0, "learned_tokens": int(store.responses.sum())
    }  # fmt: skip
    before = (tmp_path / "tokens" / "store.json").stat().st_mtime_ns
    again = tokenize_conversations([str(tmp_path / "said.jsonl")], TOKENIZER, tmp_path / "tokens", longest=1000)
    assert again.facts == store.facts and (tmp_path / "tokens" / "store.json").stat().st_mtime_ns == before
    other = tokenize_conversations(
        [str(tmp_path / "said.jsonl")], tokenizer_with(ENDLESS), tmp_path / "tokens", longest=1000
    )
    assert other.fingerprint != store.fingerprint and len(list((tmp_path / "tokens").glob("*.bin"))) == 2


def test_the_mask_is_part_of_the_fingerprint(tmp_path):
    """Two conversations may be the same text and differ in who said it."""
    plain = "{% for message in messages %}{{ message['content'] + eos_token }}{% endfor %}"
    one, two = tmp_path / "one", tmp_path / "two"
    stores = []
    for folder, said in ((one, talk("a", "b", "c", "d")), (two, talk("!a", "b", "c")[:1] + talk("b", "c", "x", "d")[:2])):
        folder.mkdir()
        last = [{"role": "assistant", "content": "d"}] if folder is two else []
        stores.append(store_in(folder, said + last, tokenizer=tokenizer_with(plain)))
    assert stores[0].tokens.tolist() == stores[1].tokens.tolist()
    assert stores[0].responses.tolist() != stores[1].responses.tolist()
    assert stores[0].fingerprint != stores[1].fingerprint


def test_what_is_too_long_is_cut_behind_an_answer_or_left_out_and_counted(tmp_path):
    short, long = talk("hi", "ho"), talk("hi", "ho", "and", "the " * 30)
    limit = len(encode(short, TOKENIZER)[0][0])
    store = store_in(tmp_path, short, long, talk("hi " * 30, "ho"), talk("hi", " "), longest=limit)
    assert len(store) == 2 and store.document(0).tolist() == store.document(1).tolist()
    assert {key: store.facts[key] for key in ("conversations", "cut", "too_long", "empty")} == {
        "conversations": 4, "cut": 1, "too_long": 1, "empty": 1
    }  # fmt: skip
    with pytest.raises(InputError, match="None of the 4 conversations"):
        store_in(tmp_path, short, long, talk("hi " * 30, "ho"), talk("hi", " "), longest=limit - 1)


# --- packing --------------------------------------------------------------------


def whole_store(lengths, seed=0) -> SimpleNamespace:
    """Documents of these lengths, all tokens different, a random half of them learned."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    flags = np.random.default_rng(seed).random(int(offsets[-1])) < 0.5
    return SimpleNamespace(tokens=np.arange(1, offsets[-1] + 1), offsets=offsets, responses=flags)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=25), st.integers(12, 20), st.integers(0, 3), st.integers(0, 2))
def test_every_conversation_is_whole_in_one_block_of_every_epoch(lengths, size, seed, epoch):
    store = whole_store(lengths)
    blocks = WholeBlocks(store, np.arange(len(lengths)), size, seed=seed)
    found = []
    for index in range(blocks.num_blocks(epoch)):
        tokens, segments, positions, responses = blocks.block(epoch, index)
        assert tokens.shape == segments.shape == positions.shape == responses.shape == (size,)
        for segment in range(segments.max() + 1):
            here = segments == segment
            assert positions[here].tolist() == list(range(here.sum()))
            text = tokens[here]
            if len(set(text.tolist())) == len(text) and not (segment > 0 and text[0] == tokens[np.flatnonzero(here)[0] - 1]):
                found.append((text.tolist(), responses[here].tolist()))
            else:
                assert not responses[here].any()  # padding
    expected = [
        (store.tokens[a:b].tolist(), store.responses[a:b].tolist())
        for a, b in zip(store.offsets[:-1], store.offsets[1:], strict=True)
    ]
    assert sorted(found) == sorted(expected)
    assert blocks.num_blocks() <= 2 * math.ceil(sum(lengths) / size)  # of two blocks one at least is half full


def test_batches_depend_on_the_seed_and_their_number_alone_and_validation_keeps_its_order():
    store = whole_store([5, 3, 8, 2, 7, 4])
    one, other = (WholeBlocks(store, np.arange(6), 8, seed=4) for _ in range(2))
    other.batch(9, 2)
    for name, value in one.batch(3, 2).items():
        assert torch.equal(value, other.batch(3, 2)[name])
    assert one.batch(0, 1)["responses"].dtype == torch.bool
    fixed = WholeBlocks(store, np.arange(6), 8, seed=4, shuffle=False)
    assert [fixed.block(0, i)[0].tolist() for i in range(4)] == [fixed.block(5, i)[0].tolist() for i in range(4)]


def test_conversations_are_refused_where_they_would_be_cut_or_their_mask_ignored():
    store = whole_store([5, 9])
    with pytest.raises(InputError, match="9 tokens does not fit a block of 8"):
        WholeBlocks(store, np.arange(2), 8, seed=0)
    with pytest.raises(InputError, match="WholeBlocks"):
        Blocks(store, np.arange(2), 4, seed=0)
    store.responses = None
    with pytest.raises(InputError, match="other kind"):
        WholeBlocks(store, np.arange(2), 16, seed=0)


# --- the objective --------------------------------------------------------------

BATCH = {  # one conversation of two answers (5 6) and (8), and a second document (9 | 10)
    "tokens": torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10]]),
    "segments": torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1]]),
    "positions": torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1]]),
    "responses": torch.tensor([[False, False, True, True, False, True, False, True]]),
}
IGNORE = -100


def test_a_target_counts_where_the_target_itself_is_a_response():
    tokens, segments, responses = (BATCH[name] for name in ("tokens", "segments", "responses"))
    assert targets(tokens, segments, 1, responses).tolist() == [[IGNORE, 5, 6, IGNORE, 8, IGNORE, 10, IGNORE]]
    assert targets(tokens, segments, 2, responses).tolist() == [[5, 6, IGNORE, 8, IGNORE, IGNORE, IGNORE, IGNORE]]
    assert targets(tokens, segments, 3, responses).tolist() == [[6, IGNORE, 8, IGNORE, IGNORE, IGNORE, IGNORE, IGNORE]]
    assert target_counts(tokens, segments, 3, responses) == [4, 3, 2]
    assert scored_positions(tokens, segments, 2, responses).tolist() == [[False, True, *[False] * 6]]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.booleans()), min_size=1, max_size=12), st.integers(1, 4), st.data())
def test_masked_targets_are_those_of_a_loop(pieces, shift, data):
    segments = torch.tensor([[i for i, (length, _) in enumerate(pieces) for _ in range(length)]])
    length = segments.shape[1]
    tokens = torch.arange(1, length + 1)[None]
    responses = torch.tensor([data.draw(st.lists(st.booleans(), min_size=length, max_size=length))])
    slow = [
        int(tokens[0, t + shift])
        if t + shift < length and segments[0, t] == segments[0, t + shift] and responses[0, t + shift]
        else IGNORE
        for t in range(length)
    ]
    assert targets(tokens, segments, shift, responses).tolist() == [slow]


def naive_log_probabilities(model, batch) -> list[list[tuple[int, float]]]:
    """For each head, (position of the prediction, log p of its target) of every response token, each document alone."""
    found: list[list[tuple[int, float]]] = [[] for _ in range(model.num_heads)]
    for segment in range(int(batch["segments"].max()) + 1):
        here = (batch["segments"][0] == segment).nonzero().flatten()
        logits = model.logits(batch["tokens"][:, here])[:, 0].float().log_softmax(-1)
        flags = batch["responses"][0, here]
        for i in range(1, model.num_heads + 1):
            for t in range(len(here) - i):
                if flags[t + i]:
                    value = logits[i - 1, t, batch["tokens"][0, here[t + i]]].item()
                    found[i - 1].append((int(here[t]), value))
    return found


def test_losses_are_those_of_a_loop_over_response_targets():
    model = tiny()
    expected = [-sum(value for _, value in head) for head in naive_log_probabilities(model, BATCH)]
    assert heads_loss(model, **BATCH).tolist() == pytest.approx(expected, rel=1e-5)
    assert heads_loss(model, **BATCH, options=PLAIN).tolist() == pytest.approx(expected, rel=1e-5)
    whole = {name: value for name, value in BATCH.items() if name != "responses"}
    assert heads_loss(model, **whole).tolist() != pytest.approx(expected, rel=1e-3)


def test_gradients_are_those_of_the_mean_over_response_targets():
    model = tiny()
    heads_loss(model.freeze_base(), **BATCH, options=FROZEN)
    mine = {name: p.grad.clone() for name, p in model.heads.named_parameters()}
    model.zero_grad()
    # By hand: head 2's targets 5, 6 at positions 0, 1 and 8 at 3; head 3's 6 at 0 and 8 at 2.
    logits = model.logits(BATCH["tokens"][:, :6])[:, 0].float().log_softmax(-1)
    loss = -(logits[1, 0, 5] + logits[1, 1, 6] + logits[1, 3, 8]) / 3 - (logits[2, 0, 6] + logits[2, 2, 8]) / 2
    loss.backward()
    for name, p in model.heads.named_parameters():
        assert torch.allclose(mine[name], p.grad, atol=2e-5 * max(1.0, float(p.grad.abs().max()))), name


def test_a_coupled_head_is_given_the_prompts_last_token_though_it_is_no_target():
    model = tiny(coupling_rank=4)
    with torch.no_grad():
        for parameter in model.coupling.parameters():
            parameter.normal_()
    sums = heads_loss(model, **BATCH)
    hidden = model.hidden(BATCH["tokens"][:, :6])  # head 2 at position 0: token 5 behind token 4, a prompt's
    expected = 0.0
    for t, before, target in ((0, 4, 5), (1, 5, 6), (3, 7, 8)):
        state = hidden[1, :, t]
        logits = model.readout(state[None], 2)[0].float()
        shift = model.coupling.hidden_correction(2, state, torch.tensor([before]))
        corrected = logits + torch.nn.functional.linear(shift, model.output_weight(2)).float()
        expected -= corrected.log_softmax(-1)[0, target].item()
    assert sums[3].item() == pytest.approx(expected, rel=1e-5)


def test_perplexities_are_over_positions_whose_targets_are_all_responses(tmp_path):
    lengths = [9, 7, 11, 5]
    store = whole_store(lengths, seed=3)
    store.tokens = store.tokens % 11
    model = tiny(num_heads=2)
    blocks = WholeBlocks(store, np.arange(4), 12, seed=0, shuffle=False)
    found = perplexities(model, blocks, batch_size=2, bf16=False)
    sums, places = np.zeros(2), 0
    for a, b in zip(store.offsets[:-1], store.offsets[1:], strict=True):
        tokens, flags = torch.tensor(store.tokens[a:b])[None], store.responses[a:b]
        logits = model.logits(tokens)[:, 0].float().log_softmax(-1)
        for t in range(b - a - 2):
            if flags[t + 1] and flags[t + 2]:
                sums += [logits[0, t, tokens[0, t + 1]].item(), logits[1, t, tokens[0, t + 2]].item()]
                places += 1
    assert found.heads == pytest.approx(np.exp(-sums / places).tolist(), rel=1e-4)


# --- LoRA -----------------------------------------------------------------------


def test_low_rank_changes_train_and_are_merged_into_a_plain_model():
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lora = TrunkLora(model, 2)
    trained = [name for name, p in model.base.named_parameters() if p.requires_grad]
    assert trained and all(".lora_" in name for name in trained)
    assert all(p.requires_grad for p in model.heads.parameters())
    heads_loss(model, **BATCH, options=PLAIN)
    with torch.no_grad():
        for name, parameter in model.base.named_parameters():
            if ".lora_B." in name:
                assert parameter.grad.abs().max() > 0
                parameter.normal_()
    changed = model.logits(BATCH["tokens"])
    lora.merge()
    assert model.state_dict().keys() == before.keys()
    assert torch.allclose(model.logits(BATCH["tokens"]), changed, atol=1e-4)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and all(name.startswith("base.") and ".layers." in name for name in moved)
    with pytest.raises(InputError, match="--lora-rank is 0"):
        TrunkLora(model, 0)
    with pytest.raises(InputError, match="adapters"):
        TrunkLora(tiny(adapter_rank=2), 2)


# --- tables ---------------------------------------------------------------------


def test_a_table_gets_the_answers_ngrams_and_no_others(tmp_path):
    store = whole_store([6, 3])
    store.responses = np.array([0, 1, 1, 0, 1, 0, 0, 1, 1], dtype=bool)
    store.document = lambda index: store.tokens[store.offsets[index] : store.offsets[index + 1]]
    store.tokenizer = ""
    assert [run.tolist() for run in answers(store, np.arange(2))] == [[2, 3], [5], [8, 9]]
    model = DynaMoForCausalLM.from_base(neox(), num_heads=2)
    mine = count([np.array(run) for run in ([2, 3], [5], [8, 9])], vocab_size=300, order=2)
    add_answers(model, store, np.arange(2))
    assert model.cooccurrence == mine
    before = count([np.array([2, 3, 4])], vocab_size=300, order=3)
    model.cooccurrence = before
    add_answers(model, store, np.array([0]), weight=2)
    again = count([np.array(run) for run in ([2, 3], [5])] * 2, vocab_size=300, order=3)
    assert model.cooccurrence == Cooccurrence.merge(before, again)


# --- filtering ------------------------------------------------------------------


class Lengths:
    """A judge who likes long answers, and has nothing to say of some."""

    name, caveat = "lengths", "It counts characters."

    def __init__(self):
        self.asked = []

    def singles(self, items, *, progress=None):
        self.asked += items
        return [None if "?" in text else float(len(text)) for _, text in items]


def test_a_conversation_is_worth_the_mean_of_its_answers():
    said = talk("!be kind", "hi", "ho", "bye", "ciao")
    assert turns(said) == [
        ("System: be kind\n\nUser: hi\n\n", "ho"),
        ("System: be kind\n\nUser: hi\n\nAssistant: ho\n\nUser: bye\n\n", "ciao"),
    ]
    judge = Lengths()
    assert scores(judge, [talk("hi", "abc"), said, talk("hi", "abc", "so", "?")]) == [3.0, 3.0, None]
    assert judge.asked[0] == ("hi\n\n", "abc")


def test_the_best_are_kept_in_their_order_and_the_first_of_equals():
    assert best([1.0, None, 5.0, 3.0, 3.0], 2) == [2, 3]
    assert best([1.0, None, 5.0, 3.0, 3.0], 4) == [0, 2, 3, 4]
    with pytest.raises(InputError, match="only 4 of 5"):
        best([1.0, None, 5.0, 3.0, 3.0], 5)
    with pytest.raises(InputError, match="--keep is 0"):
        best([1.0], 0)


# --- self-distillation ----------------------------------------------------------


def parrot(answer: str) -> DynaMoForCausalLM:
    """A model that answers every chat with `answer`, whose characters must differ, and ends."""
    chain = torch.eye(300) * 0.9 + 0.1 / 300
    last = encode_chat(TOKENIZER, talk("hi"))[-1]
    for token in [*(TOKENIZER(letter).input_ids[0] for letter in answer), TOKENIZER.eos_token_id]:
        chain[last] = 0.001 / 299
        chain[last, token] = 0.999
        last = token
    return markov_dynamo(chain, cycle(300), context=256)


def test_answers_are_the_models_own_turn_by_turn_and_kept(tmp_path):
    model = parrot("xyz")
    said = [talk("hi", "something"), talk("!be kind", "a", "b", "c", "d")]
    options = {"longest": 200, "max_new_tokens": 8}
    done = []

    def answerer() -> BatchAnswerer:
        return BatchAnswerer(model, TOKENIZER, temperature=0.0, batch_size=2)

    found = distill(
        answerer(),
        TOKENIZER,
        said,
        cache=tmp_path / "answers.jsonl",
        progress=lambda *counts: done.append(counts),
        **options,
    )
    assert found == [talk("hi", "xyz"), talk("!be kind", "a", "xyz", "c", "xyz")]
    assert done[-1] == (3, 3, 12)  # "xyz" and the end, three times
    lines = (tmp_path / "answers.jsonl").read_text()
    assert len(lines.splitlines()) == 3
    assert distill(answerer(), TOKENIZER, said, cache=tmp_path / "answers.jsonl", **options) == found
    assert (tmp_path / "answers.jsonl").read_text() == lines  # nothing was decoded again


def test_sampled_answers_do_not_depend_on_the_batch():
    letters = [TOKENIZER(letter).input_ids[0] for letter in "abcdefgh"]
    chain = torch.full((300, 300), 0.01 / 291)
    chain[:, letters], chain[:, TOKENIZER.eos_token_id] = 0.8 / 8, 0.19
    model = markov_dynamo(chain, chain, context=256)
    said = [talk(text, "x") for text in ("hi", "the fox", "one day", "sad", "big bird")]
    options = {"longest": 120, "max_new_tokens": 60}

    def answers(batch_size: int, seed: int = 5):
        answerer = BatchAnswerer(model, TOKENIZER, temperature=1.0, batch_size=batch_size)
        return distill(answerer, TOKENIZER, said, seed=seed, **options)

    one = answers(1)
    assert one == answers(4)
    assert len({conversation[-1]["content"] for conversation in one if conversation}) > 2
    assert one != answers(4, seed=6)


def test_an_answer_is_kept_up_to_its_limit_and_one_without_room_is_left_out():
    model = parrot("xyz")
    said = [talk("hi", "x"), talk("the " * 40, "x"), talk("hi", "x", "the " * 40, "y")]
    room = len(encode_chat(TOKENIZER, talk("hi"))) + 4
    greedy = BatchAnswerer(model, TOKENIZER, temperature=0.0)
    found = distill(greedy, TOKENIZER, said, longest=room, max_new_tokens=8)
    assert found == [talk("hi", "xyz"), None, None]
    assert distill(greedy, TOKENIZER, said[:1], longest=room, max_new_tokens=2) == [talk("hi", "xy")]
    with pytest.raises(InputError, match="--distill-temperature"):
        BatchAnswerer(model, TOKENIZER, temperature=-1)


def test_an_answer_that_loops_ends_with_its_first_repetition():
    assert repeated([1, 2, 3] + [4, 5] * 6) == 10
    assert repeated([1, 2, 3] + [4, 5] * 5) == 0
    assert repeated(list(range(20)) * 3) == 40
    assert repeated([*range(20), *range(20), *range(19)]) == 0
    first, second = (TOKENIZER(letter).input_ids[0] for letter in "ab")
    chain = torch.full((300, 300), 0.1 / 299)
    chain[:, first] = chain[first, second] = 0.9
    chain[first, first] = 0.1 / 299
    model = markov_dynamo(chain, chain, context=256)
    greedy = BatchAnswerer(model, TOKENIZER, temperature=0.0)
    (found,) = distill(greedy, TOKENIZER, [talk("hi", "x")], longest=200, max_new_tokens=100)
    assert found[-1]["content"] in ("ab" * n for n in range(1, 6))


def test_a_server_answers_several_questions_at_a_time():
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    seen, hosts = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append(request)
            hosts.append(self.headers["Host"])
            if request["model"] != "mine":
                self.send_response(404)
                self.end_headers()
                return
            text = request["messages"][-1]["content"].upper()
            body = json.dumps({
                "id": "1", "object": "chat.completion", "created": 0, "model": "mine",
                "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
                "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
            }).encode()  # fmt: skip
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    questions = [talk("hi", "x", "you", "y"), talk("the fox", "x")]
    try:
        answerer = EndpointAnswerer(url, url.replace("127.0.0.1", "localhost"), model="mine", temperature=0.5, requests=2)
        found = distill(answerer, TOKENIZER, questions, longest=200, max_new_tokens=9)
        assert found == [talk("hi", "HI", "you", "YOU"), talk("the fox", "THE FOX")]
        assert {request["temperature"] for request in seen} == {0.5}
        assert {host.partition(":")[0] for host in hosts} == {"127.0.0.1", "localhost"}  # two addresses take turns
        with pytest.raises(InputError, match="gave no answer"):
            distill(EndpointAnswerer(url, model="other"), TOKENIZER, questions, longest=200, max_new_tokens=9)
    finally:
        server.shutdown()
