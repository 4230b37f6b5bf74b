"""The server, asked by clients that no one here wrote: the openai package, lm_eval, schemathesis; over real sockets."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import processes
import pytest
import structlog
import torch
from served import CONTEXT, PROMPTS, Served, offline, openai_client, serving, small, text_of

from dynamo_lm.errors import InputError
from dynamo_lm.serving import server
from dynamo_lm.serving.limits import Limits
from dynamo_lm.serving.settings import GenerationSettings

GREEDY = {"model": "small", "temperature": 0}


@pytest.fixture(scope="module")
def served():
    with serving() as running:
        yield running


def base_log_probs(ids: list[int]) -> torch.Tensor:
    """log p of every token behind the ones before it, over the vocabulary: (length - 1, vocabulary)."""
    with torch.inference_mode():
        return small()[0](torch.tensor([ids])).logits[0, :-1].log_softmax(-1)


# ---------------------------------------------------------------- the openai package


def test_a_completion_is_the_offline_text_with_what_it_cost(served):
    answer = served.client().completions.create(prompt=PROMPTS[0], max_tokens=24, **GREEDY)
    assert answer.choices[0].text == text_of(offline(PROMPTS[0], 24))
    assert answer.choices[0].finish_reason == "length"
    length = len(small()[1](PROMPTS[0])["input_ids"])
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (length, 24)
    figures = answer.dynamo
    assert figures["new_tokens"] == sum(figures["step_sizes"]) == 24 and figures["ceiling"] == 3
    assert (
        len(figures["step_sizes"]) == figures["forwards"] and figures["verify"] == "strict" and figures["mean_regret"] == 0
    )
    assert served.client().models.list().data[0].id == "small"
    assert served.client().models.retrieve("small").id == "small"


def test_prompts_come_as_text_or_tokens_one_or_several(served):
    ids = [small()[1](prompt)["input_ids"] for prompt in PROMPTS[:3]]
    for prompt in (PROMPTS[:3], ids):
        answer = served.client().completions.create(prompt=prompt, max_tokens=8, **GREEDY)
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert [choice.text for choice in answer.choices] == [text_of(offline(each, 8)) for each in PROMPTS[:3]]
        assert answer.usage.prompt_tokens == sum(map(len, ids)) and answer.usage.completion_tokens == 24
    alone = served.client().completions.create(prompt=ids[1], max_tokens=8, echo=True, **GREEDY)
    assert alone.choices[0].text == PROMPTS[1] + text_of(offline(PROMPTS[1], 8))


def test_a_stream_says_the_same_step_by_step(served):
    chunks = list(
        served.client().completions.create(
            prompt=PROMPTS[2], max_tokens=40, n=2, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    for index in (0, 1):
        mine = [chunk for chunk in chunks if chunk.choices and chunk.choices[0].index == index]
        assert "".join(chunk.choices[0].text for chunk in mine) == text_of(offline(PROMPTS[2], 40))
        assert [chunk.choices[0].finish_reason for chunk in mine] == [None] * (len(mine) - 1) + ["length"]
        sizes = [len(chunk.dynamo["step"]) for chunk in mine[:-1]]
        assert sizes == mine[-1].dynamo["step_sizes"] and sum(sizes) == 40
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 80
    assert all(chunk.usage is None for chunk in chunks[:-1])
    raw = served.post("/v1/completions", json={**GREEDY, "prompt": "a", "max_tokens": 2, "stream": True})
    assert raw.headers["content-type"].startswith("text/event-stream") and raw.text.endswith("data: [DONE]\n\n")


def test_a_chat_takes_the_template_and_begins_with_its_role(served):
    messages = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "fox"}]},
    ]
    client = served.client()
    whole = client.chat.completions.create(messages=messages, max_completion_tokens=16, **GREEDY)
    expected = text_of(offline("be kind\n\nUser:\nthe fox\n\nAssistant:\n", 16))
    assert whole.choices[0].message.content == expected and whole.choices[0].message.role == "assistant"
    chunks = list(client.chat.completions.create(messages=messages, max_tokens=16, stream=True, **GREEDY))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices[0].finish_reason == "length"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert chunks[-1].dynamo["new_tokens"] == 16


def test_many_at_once_get_what_each_would_get_alone(served):
    """Strict greedy answers among sampled and unverified ones, streamed or not, joining and leaving one batch."""

    async def one(client, number):
        prompt, tokens = PROMPTS[number % 6], 10 + 7 * (number % 5)
        extra = [{}, {"verify": "off", "eps_b": 0.2}, {}, {"num_heads": 1}][number % 4]
        temperature = 1.0 if number % 4 == 1 else 0
        asked = {"prompt": prompt, "max_tokens": tokens, "model": "small", "temperature": temperature, "extra_body": extra}
        if number % 3:
            answer = await client.completions.create(**asked)
            return number, answer.choices[0].text
        parts = [chunk.choices[0].text async for chunk in await client.completions.create(stream=True, **asked)]
        return number, "".join(parts)

    async def everybody():
        client = served.later()
        return await asyncio.gather(*(one(client, number) for number in range(32)))

    for number, text in asyncio.run(everybody()):
        if number % 4 != 1:
            assert text == text_of(offline(PROMPTS[number % 6], 38)[: 10 + 7 * (number % 5)]), number


def test_sampling_is_the_offline_sampling_of_the_seed(served):
    asked = {"model": "small", "prompt": PROMPTS[1], "max_tokens": 20, "seed": 5, "temperature": 0.8, "top_p": 0.9}
    answer = served.client().completions.create(n=3, extra_body={"top_k": 40}, **asked)
    for number, choice in enumerate(answer.choices):
        how = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 40, "seed": 5 + number}
        assert choice.text == text_of(offline(PROMPTS[1], 20, **how))
    assert len({choice.text for choice in answer.choices}) == 3
    assert [choice.dynamo["new_tokens"] for choice in answer.choices] == [20, 20, 20]
    off = {"verify": "off", "eps_b": 0.3, "top_k": 20, "repetition_penalty": 1.2}
    answer = served.client().completions.create(extra_body=off, **{**asked, "top_p": None})
    offline_off = offline(PROMPTS[1], 20, do_sample=True, temperature=0.8, seed=5, **off)
    assert answer.choices[0].text == text_of(offline_off) and answer.dynamo["eps_b"] == 0.3


@pytest.mark.parametrize("extra", [{}, {"verify": "off", "eps_b": 0.1}, {"verify": 0.5}])
@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_the_bases_own(served, extra, stream):
    asked = {"model": "small", "prompt": PROMPTS[0], "max_tokens": 12, "seed": 3, "logprobs": 4, "echo": True}
    answer = served.client().completions.create(stream=stream, extra_body=extra, **asked)
    parts = [chunk.choices[0] for chunk in answer] if stream else [answer.choices[0]]
    whole = "".join(part.text for part in parts)
    scores = [part.logprobs for part in parts if part.logprobs]
    tokens = [token for each in scores for token in each.tokens]
    values = [value for each in scores for value in each.token_logprobs]
    tops = [top for each in scores for top in each.top_logprobs]
    prompt = small()[1](PROMPTS[0])["input_ids"]
    assert len(tokens) == len(prompt) + 12 and values[0] is None and tops[0] is None
    written = served.client().completions.create(extra_body=extra, **{**asked, "logprobs": None, "echo": False})
    assert whole == PROMPTS[0] + written.choices[0].text  # scores change no text
    by_text = {served_text: token for token in range(300) for served_text in [vocabulary_text(token)]}
    ids = [by_text[token] for token in tokens]
    expected = base_log_probs(ids)
    for place in range(1, len(ids)):
        assert values[place] == pytest.approx(expected[place - 1, ids[place]].item(), abs=2e-4)
        assert max(tops[place].values()) == pytest.approx(expected[place - 1].max().item(), abs=2e-4)
    offsets = [offset for each in scores for offset in each.text_offset]
    assert offsets == sorted(offsets) and offsets[0] == 0 and offsets[1] == len(tokens[0])


def vocabulary_text(token: int) -> str:
    from dynamo_lm.serving.token_text import Vocabulary

    return Vocabulary(small()[1]).text(token)


def test_a_prompt_alone_can_be_scored(served):
    answer = served.client().completions.create(prompt=PROMPTS[3], max_tokens=0, echo=True, logprobs=0, **GREEDY)
    ids = small()[1](PROMPTS[3])["input_ids"]
    assert answer.choices[0].text == PROMPTS[3] and answer.usage.completion_tokens == 0
    expected = [base_log_probs(ids)[place, token].item() for place, token in enumerate(ids[1:])]
    assert answer.choices[0].logprobs.token_logprobs[1:] == pytest.approx(expected, abs=2e-4)


def test_chat_logprobs_come_with_bytes_that_make_the_text(served):
    asked = {"messages": [{"role": "user", "content": "it was"}], "max_tokens": 30, "logprobs": True, "top_logprobs": 2}
    answer = served.client().chat.completions.create(**asked, **GREEDY)
    content = answer.choices[0].logprobs.content
    raw = bytes(byte for each in content for byte in each.bytes)
    assert raw.decode(errors="replace") == answer.choices[0].message.content
    assert all(len(each.top_logprobs) == 2 and each.logprob == each.top_logprobs[0].logprob for each in content)


def test_stop_strings_end_a_text_and_are_never_shown(served):
    text = text_of(offline(PROMPTS[1], 120))
    stop = " ran"
    expected = text[: text.index(stop)]
    asked = {"prompt": PROMPTS[1], "max_tokens": 120, **GREEDY}
    for given in (stop, ["never here", stop]):
        answer = served.client().completions.create(stop=given, logprobs=1, **asked)
        assert answer.choices[0].text == expected and answer.choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens < 120
        offsets = answer.choices[0].logprobs.text_offset
        assert all(offset < len(expected) for offset in offsets)
    chunks = list(served.client().completions.create(stop=stop, stream=True, **asked))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_more_than_four_stop_strings_are_taken(served):
    text = text_of(offline(PROMPTS[1], 120))
    stops = [*(f"never {number}" for number in range(255)), " ran"]
    answer = served.client().completions.create(prompt=PROMPTS[1], max_tokens=120, stop=stops, **GREEDY)
    assert answer.choices[0].text == text[: text.index(" ran")] and answer.choices[0].finish_reason == "stop"


# ---------------------------------------------------------------- refusals


REFUSED = [
    ({"model": "gpt-4"}, 404, "gpt-4"),
    ({"max_tokens": CONTEXT}, 400, f"{CONTEXT}"),
    ({"max_tokens": -1}, 400, "max_tokens"),
    ({"max_tokens": 0}, 400, "echo"),
    ({"max_tokens": 10**400}, 400, "max_tokens"),
    ({"prompt": "fox " * 100_000}, 400, "cannot fit"),
    ({"prompt": [7] * (CONTEXT + 1)}, 400, f"{CONTEXT + 1} tokens"),
    ({"prompt": [300]}, 400, "vocabulary"),
    ({"prompt": [-1]}, 400, "prompt[0] is -1"),
    ({"prompt": ["a", 1]}, 400, "prompt[1] is 1"),
    ({"prompt": [[1], [2, "a"]]}, 400, 'prompt[1][1] is "a": it must be a valid integer'),
    ({"prompt": []}, 400, "empty"),
    ({"prompt": [[]]}, 400, "empty"),
    ({"prompt": {"a": 1}}, 400, "must be a text"),
    ({"prompt": "\ud800"}, 400, "no text"),
    ({"prompt": ["a"] * 81}, 400, "81 texts"),
    ({"n": 129}, 400, "n is 129"),
    ({"temperature": 3}, 400, "temperature"),
    ({"temperature": float("nan")}, 400, "temperature"),
    ({"temperature": float("inf")}, 400, "temperature"),
    ({"top_p": 1.5}, 400, "top_p"),
    ({"stop": ["a"] * 257}, 400, "at most 256"),
    ({"stop": ""}, 400, 'stop is ""'),
    ({"stop": 5}, 400, "stop is 5: it must be a text or a list of texts"),
    ({"stop": ["a", "b", 5]}, 400, "stop[2] is 5: it must be a valid string"),
    ({"seed": 2**63}, 400, "seed"),
    ({"logprobs": 21}, 400, "logprobs"),
    ({"verify": "nearly"}, 400, 'verify is "nearly": it must be "strict", "off" or a number of nats per token'),
    ({"verify": -0.1}, 400, "verify is -0.1: it must be greater than or equal to 0"),
    ({"verify": True}, 400, "verify is true: it must be"),
    ({"eps_b": 0.5}, 400, "verify"),
    ({"eps_b": 2, "verify": "off"}, 400, "eps_b"),
    ({"top_p": 0.5, "verify": "off"}, 400, "top_p"),
    ({"top_k": 101, "verify": "off"}, 400, "100"),
    ({"num_heads": 4}, 400, "num_heads"),
    ({"logit_bias": {"5": 1}}, 400, "logit_bias"),
    ({"presence_penalty": 0.5}, 400, "presence_penalty"),
    ({"min_p": 0.1}, 400, "min_p"),  # other servers' fields
    ({"min_tokens": 5}, 400, "min_tokens"),
    ({"ignore_eos": True}, 400, "ignore_eos"),
    ({"stop_token_ids": [7]}, 400, "stop_token_ids"),
    ({"response_format": {"type": "json_object"}}, 400, "response_format"),
    ({"suffix": "x"}, 400, "suffix"),
    ({"best_of": 2}, 400, "best_of"),
    ({"stream_options": {"include_usage": True}}, 400, "stream"),
]


@pytest.mark.parametrize(("changed", "status", "says"), REFUSED, ids=lambda value: str(value)[:30])
def test_what_cannot_be_done_is_one_sentence_in_openais_form(served, changed, status, says):
    body = json.dumps({**GREEDY, "prompt": "a", "max_tokens": 2} | changed)
    answer = served.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert answer.status_code == status and says in error["message"], error
    assert error.keys() == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert "\n" not in error["message"]


def test_fields_of_other_servers_that_change_nothing_are_taken(served):
    nothing = {"min_p": 0, "min_tokens": 0, "ignore_eos": False, "stop_token_ids": [], "logit_bias": {}}
    answer = served.post("/v1/completions", json={**GREEDY, "prompt": "a", "max_tokens": 2, **nothing})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role is"),
        ({"messages": [{"role": "user", "content": 5}]}, "it must be a text or a list of parts"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type is \"image_url\": it must be 'text'",
        ),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "fox " * 100_000}]}, "cannot fit"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"top_logprobs": 2}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_chats_that_cannot_be_are_refused(served, changed, says):
    body = json.dumps({**GREEDY, "messages": [{"role": "user", "content": "a"}], "max_tokens": 2} | changed)
    answer = served.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and says in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'"a"', b"\xff\xfe", b"[" * 100_000, b'{"model": ' + b"9" * 5000 + b"}"]
)
def test_bodies_that_are_no_request_are_refused(served, content):
    answer = served.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_a_body_that_is_no_utf_8_says_where(served):
    headers = {"content-type": "application/json"}
    answer = served.post("/v1/completions", content=b'{"prompt": "caf\xe9"}', headers=headers)
    assert answer.status_code == 400 and answer.json()["error"]["message"] == "The body is not UTF-8: byte 16 is 0xe9."


def test_the_openai_package_knows_the_errors(served):
    client = served.client()
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.BadRequestError, match="context"):
        client.completions.create(model="small", prompt="a", max_tokens=CONTEXT)
    assert served.get("/nowhere").status_code == 404 and "error" in served.get("/nowhere").json()
    assert served.get("/v1/completions").status_code == 405


# ---------------------------------------------------------------- doors and limits


def test_a_strict_server_refuses_lossy_decoding():
    with serving(strict_only=True) as served:
        for verify in ("off", 0.1):
            with pytest.raises(openai.BadRequestError, match="strict-only"):
                served.client().completions.create(prompt="a", extra_body={"verify": verify}, **GREEDY)
        for verify in ("strict", 0):
            served.client().completions.create(prompt="a", max_tokens=2, extra_body={"verify": verify}, **GREEDY)


def test_a_servers_own_settings_hold_where_a_request_leaves_them_open():
    with serving(generation=GenerationSettings(num_heads=2, verify="off", eps_b=0.0)) as served:
        answer = served.client().completions.create(model="small", prompt="a", max_tokens=8, extra_body={"top_k": 10})
        assert answer.dynamo["verify"] == "off" and answer.dynamo["step_sizes"] == [2, 2, 2, 2]


def test_without_the_key_nobody_comes_in():
    with serving(key="a secret") as served:
        served.client(api_key="a secret").completions.create(prompt="a", max_tokens=2, **GREEDY)
        for key in ("a secre", "a secrets", "none", "é"):
            headers = {"authorization": f"Bearer {key}".encode()}
            answer = served.post("/v1/completions", json={**GREEDY, "prompt": "a"}, headers=headers)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError):
            served.client().models.list()
        assert served.get("/health").status_code == 200
        assert served.get("/metrics").status_code == served.get("/openapi.json").status_code == 401


def test_requests_for_other_hosts_are_refused_at_a_local_address():
    with serving(hosts=("localhost", "127.0.0.1", "[::1]")) as served:
        assert served.get("/v1/models").status_code == 200
        assert served.get("/v1/models", headers={"host": "localhost"}).status_code == 200
        assert served.get("/v1/models", headers={"host": "[::1]:80"}).status_code == 200
        answer = served.get("/v1/models", headers={"host": "evil.example:8000"})
        assert answer.status_code == 400 and "--allow-host" in answer.json()["error"]["message"]


def test_bodies_have_a_limit_stated_or_not():
    with serving(Limits(max_body=2000)) as served:
        body = json.dumps({**GREEDY, "prompt": "a", "user": "u" * 3000}).encode()
        stated = served.post("/v1/completions", content=body, headers={"content-type": "application/json"})
        parts = (body[i : i + 100] for i in range(0, len(body), 100))
        unstated = served.post("/v1/completions", content=parts, headers={"content-type": "application/json"})
        for answer in (stated, unstated):
            assert answer.status_code == 413 and "2000 bytes" in answer.json()["error"]["message"]


def test_prompts_and_texts_have_limits_that_the_refusal_names():
    with serving(Limits(max_prompt_tokens=6, max_tokens=10)) as served:
        for changed, says in (({"prompt": [7] * 7}, "--max-prompt-tokens"), ({"max_tokens": 11}, "--max-tokens")):
            with pytest.raises(openai.BadRequestError, match=says):
                served.client().completions.create(**{**GREEDY, "prompt": [7, 8], "max_tokens": 10} | changed)
        answer = served.client().completions.create(prompt=[7, 8], max_tokens=10, **GREEDY)
        assert answer.usage.completion_tokens == 10
        default = served.client().completions.create(prompt=[7, 8], **GREEDY)
        assert default.usage.completion_tokens == 10  # 16 is OpenAI's, but nobody asked for it


def test_a_full_queue_is_said_at_once_and_passes():
    with serving(Limits(max_batch=1, max_queue=1)) as served:
        client, long = served.client(), {"prompt": "a", "max_tokens": 2000, **GREEDY}
        streams = [client.completions.create(stream=True, **long)]
        waiting = threading.Thread(target=lambda: streams.append(client.completions.create(stream=True, **long)))
        waiting.start()
        served.until("dynamo_waiting_texts", 1)
        with pytest.raises(openai.RateLimitError) as refusal:
            client.completions.create(prompt="b", **GREEDY)
        assert int(refusal.value.response.headers["retry-after"]) >= 1
        streams[0].close()
        waiting.join()
        streams[1].close()
        served.until("dynamo_running_texts", 0)
        answer = client.completions.create(prompt=PROMPTS[0], max_tokens=8, **GREEDY)
        assert answer.choices[0].text == text_of(offline(PROMPTS[0], 8))


def test_time_has_a_limit_and_what_was_written_is_given():
    with serving(Limits(max_seconds=0.5)) as served:
        answer = served.client().completions.create(prompt=PROMPTS[0], max_tokens=4000, **GREEDY)
        assert answer.choices[0].finish_reason == "length" and answer.dynamo["timed_out"]
        tokens = answer.usage.completion_tokens
        assert 3 < tokens < 4000 and answer.choices[0].text == text_of(offline(PROMPTS[0], tokens))


def hang_up(served: Served, body: dict) -> None:
    """Sends a request, waits until it runs, and is gone."""
    host, _, port = served.url.removeprefix("http://").partition(":")
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + f"Content-Length: {len(content)}\r\n\r\n".encode() + content)
        served.until("dynamo_running_texts", 1)
        if body.get("stream"):
            assert b"200 OK" in connection.recv(1000)


@pytest.mark.parametrize("stream", [False, True])
def test_the_texts_of_a_client_that_hangs_up_leave_the_batch(served, stream):
    hang_up(served, {**GREEDY, "prompt": "a", "max_tokens": 4000, "stream": stream})
    before = served.number("dynamo_forwards_total")
    served.until("dynamo_running_texts", 0)
    assert served.number("dynamo_forwards_total") - before < 100  # 4,000 tokens take more than 1,300 steps


def test_clients_that_go_away_in_a_full_batch_change_no_other_text():
    stop = text_of(offline(PROMPTS[1], 40))[12:15]

    async def one(client, number):
        asked = {**GREEDY, "prompt": PROMPTS[number % 6], "max_tokens": 40}
        if number % 3 == 0:  # gone in the middle of its stream
            stream = await client.completions.create(**asked | {"stream": True, "max_tokens": 4000})
            parts = [(await anext(stream)).choices[0].text for _ in range(1 + number % 4)]
            await stream.close()
            return "".join(parts), text_of(offline(PROMPTS[number % 6], 40))
        if number % 3 == 1:
            answer = await client.completions.create(**asked)
            return answer.choices[0].text, text_of(offline(PROMPTS[number % 6], 40))
        parts = [chunk.choices[0].text async for chunk in await client.completions.create(stream=True, stop=stop, **asked)]
        return "".join(parts), text_of(offline(PROMPTS[number % 6], 40)).partition(stop)[0]

    async def everybody(served):
        client = served.later()
        return await asyncio.gather(*(one(client, number) for number in range(18)))

    with serving(Limits(max_batch=4, max_queue=20)) as served:
        for number, (text, expected) in enumerate(asyncio.run(everybody(served))):
            assert text == expected if number % 3 else expected.startswith(text.rstrip("\ufffd")), number
        served.until("dynamo_running_texts", 0)
        served.until("dynamo_waiting_texts", 0)
        after = served.client().completions.create(prompt=PROMPTS[0], max_tokens=8, **GREEDY)
        assert after.choices[0].text == text_of(offline(PROMPTS[0], 8))
        while served.number("dynamo_audits_total") == 0:  # once the server is idle
            time.sleep(0.01)
        assert served.number("dynamo_audit_violations_total") == 0


def test_numbers_for_prometheus_add_up(served):
    before = {name: served.number(name) for name in ("dynamo_tokens_total", "dynamo_prompt_tokens_total")}
    answer = served.client().completions.create(prompt=PROMPTS[:2], max_tokens=9, **GREEDY)
    assert served.number("dynamo_tokens_total") - before["dynamo_tokens_total"] == 18
    absorbed = served.number("dynamo_prompt_tokens_total") - before["dynamo_prompt_tokens_total"]
    assert absorbed == answer.usage.prompt_tokens
    assert served.number("dynamo_tokens_per_step_sum") == served.number("dynamo_tokens_total")
    assert served.number("dynamo_tokens_per_step_count") == served.number("dynamo_steps_total")
    for name in ("dynamo_request_seconds_count", "dynamo_time_to_first_token_seconds_count", "dynamo_back_offs_total"):
        assert served.number(name) > 0


def test_texts_are_in_the_log_only_if_that_was_asked_for():
    quiet = structlog.get_config()["wrapper_class"]
    for log_text in (False, True):
        with serving(log_text=log_text) as served:
            structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.INFO))
            try:
                with structlog.testing.capture_logs() as lines:
                    served.client().completions.create(prompt=PROMPTS[0], max_tokens=6, **GREEDY)
                    served.until("dynamo_running_texts", 0)
            finally:
                structlog.configure(wrapper_class=quiet)
        line = next(line for line in lines if line["path"] == "/v1/completions")
        assert line["status"] == 200 and line["completion_tokens"] == 6 and line["finish"] == ["length"]
        texts = ([PROMPTS[0]], [text_of(offline(PROMPTS[0], 6))])
        assert (line.get("prompts"), line.get("answers")) == (texts if log_text else (None, None))


# ---------------------------------------------------------------- the process


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model, tokenizer = small()
    path = tmp_path_factory.mktemp("served") / "small"
    model.save_pretrained(str(path))
    tokenizer.save_pretrained(str(path))
    return path


def test_clients_that_cut_lines_at_every_separator_read_a_stream(served):
    prompt = "a\u2028b\u2029c\x85d\x0be\x1ef"
    asked = {"model": "small", "prompt": prompt, "echo": True, "stream": True, "max_tokens": 2}
    with httpx.stream("POST", f"{served.url}/v1/completions", json=asked, trust_env=False, timeout=60) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    assert "".join(choice["text"] for line in lines for choice in json.loads(line)["choices"]).startswith(prompt)


def test_sigterm_under_load_loses_nothing_that_was_accepted(folder, tmp_path):
    pipe, log = tmp_path / "pipe", tmp_path / "log"
    os.mkfifo(pipe)
    line = "serve", str(folder), "--port", "0", "--max-batch", "3"
    process = processes.start(processes.command, *line, stdout=pipe, stderr=log, environment={"DYNAMO_API_KEY": "k"})
    with pipe.open() as printed:
        try:
            ready = printed.readline()
            found = re.fullmatch(r'Serving "small" at (http://127\.0\.0\.1:\d+)\n', ready)
            assert found, ready + log.read_text()
            wire = httpx.Client(base_url=found[1], headers={"authorization": "Bearer k"}, trust_env=False, timeout=60)
            client = openai_client(f"{found[1]}/v1", "k", timeout=60)

            def complete(number):
                asked = {"prompt": f"{PROMPTS[number % 3]} secret", "max_tokens": 100, **GREEDY}
                if number % 2:
                    return client.completions.create(**asked).choices[0].text
                return "".join(chunk.choices[0].text for chunk in client.completions.create(stream=True, **asked))

            def accepted():
                lines = wire.get("/metrics").text.splitlines()
                return sum(float(line.split()[-1]) for line in lines if re.match("dynamo_(running|waiting)_texts", line))

            with ThreadPoolExecutor(8) as clients:
                texts = [clients.submit(complete, number) for number in range(8)]
                deadline = time.monotonic() + 30
                while accepted() < 8:
                    assert time.monotonic() < deadline
                os.kill(process.pid, signal.SIGTERM)
                while wire.get("/health").json() != {"status": "stopping"}:
                    assert time.monotonic() < deadline
                with pytest.raises(openai.InternalServerError, match="stopping"):
                    client.completions.create(prompt="a", **GREEDY)
                for number, text in enumerate(texts):
                    assert text.result() == text_of(offline(f"{PROMPTS[number % 3]} secret", 100))
            process.join(20)
            assert process.exitcode == 0
            lines = [json.loads(line) for line in log.read_text().splitlines()]
            assert {line["event"] for line in lines} == {"request", "stopping"}
            assert sum(line.get("completion_tokens", 0) for line in lines) == 8 * 100
            assert "secret" not in json.dumps(lines) and "fox" not in json.dumps(lines)
        finally:
            process.kill()


def test_two_servers_on_one_port_are_refused_before_the_second_loads_its_model():
    with server.bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(InputError, match="the port is in use"):
            server.bind("127.0.0.1", port)


def test_what_cannot_be_served_is_said_before_the_wait(folder, capfd, monkeypatch):
    from dynamo_lm.cli.main import main

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for options, says in (
            (["--port", port], "in use"),
            (["--max-batch", "0"], "--max-batch"),
            (["--max-seconds", "nan"], "--max-seconds"),
            (["--strict-only", "--verify", "off"], "--strict-only"),
            (["--eps-b", "2"], "eps_b"),
            (["--port", "0", "--heads", "9"], "num_heads"),
        ):
            assert main(["serve", str(folder), *options]) == 2
            out, err = capfd.readouterr()
            assert out == "" and says in err and len(err.strip().splitlines()) == 1
    monkeypatch.setenv("DYNAMO_API_KEY", " ")
    assert main(["serve", str(folder)]) == 2
    assert "DYNAMO_API_KEY" in capfd.readouterr().err


# ---------------------------------------------------------------- other clients


def test_lm_eval_finds_the_offline_likelihoods_and_texts(served, folder):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from dynamo_lm.evaluation.nlu.harness import DynaMoLM

    online = LocalCompletionsAPI(
        base_url=f"{served.url}/v1/completions", model="small", tokenizer=str(folder), batch_size=4, max_length=CONTEXT
    )
    ours = DynaMoLM(*small())
    pairs = [(context, f" {word}") for context in PROMPTS[:3] for word in ("bird", "house", "sun .")]
    scored = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    for mine, theirs in zip(online.loglikelihood(scored), ours.loglikelihood(scored), strict=True):
        assert mine[0] == pytest.approx(theirs[0], abs=1e-3) and mine[1] == theirs[1]
    asked = [Instance("generate_until", {}, (prompt, {"until": ["\n"], "max_gen_toks": 20}), 0) for prompt in PROMPTS]
    assert online.generate_until(asked) == ours.generate_until(asked)


@pytest.fixture(scope="module")
def brief():
    """A server that writes little, for those who ask a lot.

    What schemathesis imports late, pytest parses to rewrite its assertions; CPython 3.11 cannot parse in two threads at a
    time, so it is imported before the server runs.
    """
    pytest.importorskip("schemathesis.specs.openapi.schemas")
    with serving(Limits(max_tokens=12, max_seconds=10)) as running:
        yield running


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/dynamo/joint"])
@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_no_body_that_schemathesis_thinks_of_breaks_the_server(brief, path, mode):
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, given, settings
    from schemathesis.specs.openapi import checks

    schema = schemathesis.openapi.from_url(f"{brief.url}/openapi.json")
    mode = schemathesis.GenerationMode(mode)
    wanted = [schemathesis.checks.not_a_server_error]
    if path.startswith("/v1"):
        wanted += [checks.status_code_conformance, checks.content_type_conformance, checks.response_schema_conformance]
    statuses = set()

    @settings(max_examples=20, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=schema[path]["POST"].as_strategy(generation_mode=mode))
    def fuzz(case):
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = "small"  # which no random text would be
        answer = case.call_and_validate(checks=wanted, timeout=20)
        statuses.add(answer.status_code)

    fuzz()
    assert statuses <= {200, 400} and (200 if path == "/dynamo/joint" and mode.is_positive else 400) in statuses
