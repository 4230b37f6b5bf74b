"""`dynamo-lm serve`: a model with OpenAI's HTTP interface."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from dynamo_lm.cli.dataclass_options import dataclass_options
from dynamo_lm.cli.options import DecodingModelOptions, Model, verification
from dynamo_lm.serving.limits import Limits


@dataclass(frozen=True, kw_only=True)
class AccessOptions:
    """Who may send requests."""

    PANEL: ClassVar[str] = "Access"

    host: Annotated[str, "Address to listen at; 0.0.0.0 is every address of this machine."] = "127.0.0.1"
    port: Annotated[int, "Port to listen at; 0 takes a free one."] = 8000
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Answer requests that are addressed to this name, too, as behind a proxy; may be given several times. At a "
            "local address others than localhost are refused.",
        ),
    ] = None

    def hosts(self) -> tuple[str, ...] | None:
        """The names that requests may be addressed to; None: any."""
        from dynamo_lm.serving import server

        return (*server.LOCAL, *(self.allow_host or [])) if server.is_local(self.host) else None


@dataclass(frozen=True, kw_only=True)
class DefaultOptions:
    """How texts are written where a request leaves it open."""

    PANEL: ClassVar[str] = "How it decodes, where a request does not say"

    verify: Annotated[str, typer.Option(metavar="strict|off|NATS", help="As in `generate`.")] = "strict"
    eps_b: Annotated[float | None, "Quality threshold of verify off. Default: the model's own, else 0.5."] = None
    num_heads: Annotated[
        int | None, typer.Option("--heads", help="The most tokens a step may give. Default: all heads.")
    ] = None
    prompt_lookup_num_tokens: Annotated[
        int | None,
        typer.Option("--prompt-lookup", metavar="N", help="As in `generate`; beside other requests at most heads - 1."),
    ] = None
    strict_only: Annotated[bool, "Refuse requests for anything but exact decoding."] = False


@dataclass(frozen=True, kw_only=True)
class ServedModelOptions(DecodingModelOptions):
    """How to open the model, and what to tell of it."""

    name: Annotated[str | None, "What clients call the model. Default: the name of its folder."] = None
    log_text: Annotated[bool, "Log prompts and answers, too."] = False
    trust_remote_code: Annotated[bool, "Run program code that comes with the model's files."] = False


@dataclass_options
def serve(
    model: Model, access: AccessOptions, defaults: DefaultOptions, limits: Limits, opening: ServedModelOptions
) -> None:
    """Serve a model to anything that speaks OpenAI's protocol.

    `/v1/completions`, `/v1/chat/completions` and `/v1/models`; a playground at `/`; `/health` and `/metrics`. With an API
    key in the environment variable DYNAMO_API_KEY clients must send it. Ctrl-C or SIGTERM finishes what was accepted, then
    ends.
    """
    from dynamo_lm.data.chat_template import chat_template
    from dynamo_lm.model.loading import open_for_evaluation, resolve
    from dynamo_lm.serving import logs, server
    from dynamo_lm.serving.app import create_app
    from dynamo_lm.serving.settings import GenerationSettings, ServerSettings

    # 1. Whatever can be wrong before the wait for the model.
    verify = verification(defaults.verify)
    folder = Path(resolve(model))
    settings = ServerSettings(
        name=opening.name or (folder.resolve().name if folder.exists() else model),
        generation=GenerationSettings(
            verify=verify,
            eps_b=defaults.eps_b,
            num_heads=defaults.num_heads,
            prompt_lookup_num_tokens=defaults.prompt_lookup_num_tokens,
        ),
        limits=limits,
        strict_only=defaults.strict_only,
        key=server.key_from_environment(),
        hosts=access.hosts(),
        log_text=opening.log_text,
    )
    bound = server.bind(access.host, access.port)

    # 2. The model.
    network, tokenizer = open_for_evaluation(
        model,
        tokenizer=opening.tokenizer,
        dtype=opening.dtype,
        device=opening.device,
        threads=opening.threads,
        base=opening.base,
        weights=opening.weights,
        allow_base_mismatch=opening.allow_base_mismatch,
        trust_remote_code=opening.trust_remote_code,
        adapt_threads=opening.adapt_threads,
    )
    if tokenizer.chat_template or tokenizer.eos_token is not None:
        chat_template(tokenizer)

    # 3. Serve until a signal.
    logs.configure()
    app = create_app(network, tokenizer, settings)
    bound.listen()  # from here on connections wait, and are not refused
    host = f"[{access.host}]" if ":" in access.host else access.host
    print(f'Serving "{settings.name}" at http://{host}:{bound.getsockname()[1]}', flush=True)
    if settings.key is None and not server.is_local(access.host):
        logs.log.warning("no_key", message="Anybody who can reach this address may use the model; set DYNAMO_API_KEY.")
    server.serve(app, bound, limits.max_seconds)
