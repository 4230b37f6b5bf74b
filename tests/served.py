"""What tests of the server share: a small model with a long context, its tokenizer, and uvicorn on a loopback port."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import httpx
import openai
import structlog
import torch
from commandline import byte_tokenizer, neox

from dynamo_lm import DynaMoForCausalLM
from dynamo_lm.data.chat_template import chat_template
from dynamo_lm.serving import server
from dynamo_lm.serving.app import create_app
from dynamo_lm.serving.limits import Limits
from dynamo_lm.serving.settings import GenerationSettings, ServerSettings

structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))  # tests print no log

CONTEXT = 4096
PROMPTS = ["the fox ran", "a red house and", "one little bird saw the", "it was", "then the happy day", "big eyes"]


@cache
def small() -> tuple[DynaMoForCausalLM, Any]:
    """A DynaMo model with random weights, three heads and no tables, and a byte-level tokenizer with a chat template."""
    base = neox(max_position_embeddings=CONTEXT).eval()
    for parameter in base.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(3)  # at the usual scale of 0.02 all tokens are nearly alike
    torch.manual_seed(1)
    model = DynaMoForCausalLM.from_base(base, num_heads=3).eval()
    tokenizer = chat_template(byte_tokenizer())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model, tokenizer


@cache
def offline(prompt: str, tokens: int, **kwargs: Any) -> list[int]:
    """What `model.generate` writes behind a prompt; not to be changed."""
    model, tokenizer = small()
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    output = model.generate(ids, max_new_tokens=tokens, **kwargs)
    return output[0, ids.shape[1] :].tolist()


def text_of(tokens: list[int]) -> str:
    return small()[1].decode(tokens, skip_special_tokens=True)


def openai_client(url: str, api_key: str, timeout: float = 120) -> openai.OpenAI:
    """The client as openai makes it, but for the certificates, which take long to read and are for HTTPS only."""
    wire = openai.DefaultHttpxClient(verify=False)
    return openai.OpenAI(base_url=url, api_key=api_key, max_retries=0, timeout=timeout, http_client=wire)


@dataclass
class Served:
    """A server that runs; `app.state` has its parts."""

    url: str
    app: Any

    def client(self, api_key: str = "none") -> openai.OpenAI:
        return openai_client(f"{self.url}/v1", api_key)

    def later(self) -> openai.AsyncOpenAI:
        wire = openai.DefaultAsyncHttpxClient(verify=False)
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120, http_client=wire)

    def post(self, path: str, **kwargs: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", timeout=120, trust_env=False, verify=False, **kwargs)

    def get(self, path: str, **kwargs: Any) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=120, trust_env=False, verify=False, **kwargs)

    def number(self, name: str) -> float:
        """The sum of a metric over its labels."""
        lines = [line.split() for line in self.get("/metrics").text.splitlines() if not line.startswith("#")]
        return sum(float(line[-1]) for line in lines if line[0].partition("{")[0] == name)

    def until(self, name: str, value: float, seconds: float = 60.0) -> None:
        """Waits for a metric to have a value."""
        began = time.monotonic()
        while self.number(name) != value:
            assert time.monotonic() - began < seconds, f"{name} is {self.number(name)}, not {value}"
            time.sleep(0.01)


@contextlib.contextmanager
def serving(
    limits: Limits | None = None, generation: GenerationSettings | None = None, *, tokenizer: Any = None, **settings: Any
) -> Iterator[Served]:
    """A server of the small model, for as long as the context lasts."""
    limits, (model, own) = limits or Limits(), small()
    how = ServerSettings(name="small", generation=generation or GenerationSettings(), limits=limits, **settings)
    app = create_app(model, tokenizer or own, how)
    bound = server.bind("127.0.0.1", 0)
    running = server.Server(app.state.middleware, limits.max_seconds)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    while not running.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield Served(f"http://127.0.0.1:{bound.getsockname()[1]}", app)
    finally:
        running.should_exit = True
        thread.join(120)
        assert not thread.is_alive()
        assert app.state.metrics.registry.get_sample_value("dynamo_audit_violations_total") == 0
