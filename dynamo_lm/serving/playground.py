"""The playground: one static page at `/`, and the joint distribution that it draws.

In: a model, its tokenizer, and the engine that decodes with it. Out: routes. The page needs nothing but this server, and its
Content-Security-Policy lets it reach nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from importlib.resources import files
from typing import Annotated, Any

from fastapi import APIRouter, Response
from pydantic import BaseModel, Field

from dynamo_lm.backbone.token_limits import stated_context
from dynamo_lm.decoding.joint_heatmap import HeatMap, heatmap
from dynamo_lm.decoding.settings import Settings
from dynamo_lm.errors import InputError
from dynamo_lm.model.modeling import DynaMoForCausalLM
from dynamo_lm.sampling.options import Algorithm1
from dynamo_lm.serving.engine import Engine


class JointRequest(BaseModel):
    """POST /dynamo/joint"""

    prompt: Annotated[str, Field(min_length=1)]
    eps_b: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None  # None: the model's own, else the paper's


def playground(model: DynaMoForCausalLM, tokenizer: Any, engine: Engine) -> APIRouter:
    """The page and its heat map, whose route raises InputError for a prompt that cannot be used."""
    router = APIRouter()
    eps_b = Settings(model.generation_config).get("eps_b", Algorithm1().eps_b)
    context = stated_context(model.config)
    longest = max(map(len, tokenizer.get_vocab()))  # characters of a token
    facts = {"heads": model.num_heads, "context": context, "eps_b": eps_b}
    page = render(facts)
    headers = {
        "content-security-policy": policy(page),
        "cache-control": "no-cache",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }

    @router.get("/", include_in_schema=False)
    async def index() -> Response:
        return Response(page, media_type="text/html; charset=utf-8", headers=headers)

    @router.post("/dynamo/joint")
    async def joint(body: JointRequest) -> HeatMap:
        """The joint of heads 1 and 2 after a prompt: plain, masked, blurred and thresholded, over the likeliest tokens."""
        if model.num_heads < 2:
            raise InputError("The model has one head, so there is no joint distribution.")
        if context and len(body.prompt) > context * longest:
            raise InputError(
                f"The prompt has {len(body.prompt)} characters, more than the context of {context} tokens holds."
            )
        return await engine.call(lambda model: heatmap(model, tokenizer, body.prompt, eps_b=body.eps_b))

    return router


def render(facts: dict[str, Any]) -> str:
    """The page, with what it needs to know of the model."""
    page = (files("dynamo_lm.serving") / "playground.html").read_text(encoding="utf-8")
    return page.replace("{{facts}}", json.dumps(facts).replace("<", "\\u003c"))


def policy(page: str) -> str:
    """The Content-Security-Policy under which the page may do what it does and nothing more: its own script and style, by
    their hashes, and requests to its own server."""

    def hashes(element: str) -> str:
        texts = re.findall(rf"<{element}>(.*?)</{element}>", page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in texts)

    rules = {
        "default-src": "'none'",
        "script-src": hashes("script"),
        "style-src": hashes("style"),
        "connect-src": "'self'",
        "img-src": "data:",  # the empty icon
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())
