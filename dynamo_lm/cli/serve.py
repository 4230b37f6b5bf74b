"""`dynamo-lm serve`: a model behind OpenAI's HTTP interface."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dynamo_lm.cli.options import MACHINE, Device, Dtype, Model, Threads, Tokenizer, verification
from dynamo_lm.errors import InputError

DECODING, LIMITS, DOOR = "How it decodes, where a request does not say", "Limits", "Who may come in"


def serve(
    model: Model,
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 is all of this machine's.", rich_help_panel=DOOR)
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0 takes a free one.", rich_help_panel=DOOR)] = 8000,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Answer requests that are addressed to this name, too, as behind a proxy; may be given several times. At a "
            "local address others than localhost are refused.",
            rich_help_panel=DOOR,
        ),
    ] = None,
    verify: Annotated[
        str, typer.Option(metavar="strict|off|NATS", help="As in `generate`.", rich_help_panel=DECODING)
    ] = "strict",
    eps_b: Annotated[
        float | None,
        typer.Option(
            "--eps-b", help="Quality dial of verify off. Default: the model's own, else 0.5.", rich_help_panel=DECODING
        ),
    ] = None,
    heads: Annotated[
        int | None,
        typer.Option("--heads", help="The most tokens a step may give. Default: all heads.", rich_help_panel=DECODING),
    ] = None,
    strict_only: Annotated[
        bool,
        typer.Option("--strict-only", help="Refuse requests for anything but exact decoding.", rich_help_panel=DECODING),
    ] = False,
    max_batch: Annotated[int, typer.Option(help="Texts decoded together.", rich_help_panel=LIMITS)] = 16,
    max_queue: Annotated[int, typer.Option(help="Texts that may wait; more get status 429.", rich_help_panel=LIMITS)] = 64,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(help="Longest prompt. Default: the model's context.", rich_help_panel=LIMITS)
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Longest text. Default: what the context leaves.", rich_help_panel=LIMITS)
    ] = None,
    max_seconds: Annotated[
        float, typer.Option(help="Longest time of a request, waiting included.", rich_help_panel=LIMITS)
    ] = 120.0,
    max_body: Annotated[int, typer.Option(help="Largest request in bytes.", rich_help_panel=LIMITS)] = 2**20,
    name: Annotated[
        str | None,
        typer.Option(help="What clients call the model. Default: the name of its folder.", rich_help_panel=MACHINE),
    ] = None,
    log_text: Annotated[
        bool, typer.Option("--log-text", help="Log prompts and answers, too.", rich_help_panel=MACHINE)
    ] = False,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code", help="Run program code that comes with the model's files.", rich_help_panel=MACHINE
        ),
    ] = False,
    tokenizer: Tokenizer = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Serve a model to anything that speaks OpenAI's protocol.

    `/v1/completions`, `/v1/chat/completions` and `/v1/models`; a playground at `/`; `/health` and `/metrics`. With an API
    key in the environment variable DYNAMO_API_KEY clients must send it. Ctrl-C or SIGTERM finishes what was accepted, then
    ends.
    """
    from dynamo_lm.data.chat_template import chat_template
    from dynamo_lm.decoding.batch import check_heads
    from dynamo_lm.model.loading import open_for_evaluation, resolve
    from dynamo_lm.sampling.options import Algorithm1
    from dynamo_lm.serving import logs, server
    from dynamo_lm.serving.app import Settings, create_app
    from dynamo_lm.serving.requests import GenerationSettings, Limits

    # 1. Everything that can be wrong before the wait for the model.
    dial = verification(verify)
    if strict_only and dial != "strict" and dial != 0:
        raise InputError(f"--strict-only refuses --verify {verify}; leave out one of them.")
    if eps_b is not None:
        Algorithm1(eps_b=eps_b)
    limits = Limits(max_batch, max_queue, max_prompt_tokens, max_tokens, max_seconds, max_body)
    key = server.key_from_environment()
    bound = server.bind(host, port)

    # 2. The model.
    network, tokens = open_for_evaluation(
        model, tokenizer=tokenizer, dtype=dtype, device=device, threads=threads, trust_remote_code=trust_remote_code
    )
    ceiling = network.num_heads if heads is None else heads
    check_heads(network, ceiling)
    if tokens.chat_template or tokens.eos_token is not None:
        chat_template(tokens)

    # 3. Serve until a signal.
    folder = Path(resolve(model))
    hosts = (*server.LOCAL, *(allow_host or [])) if server.is_local(host) else None
    settings = Settings(
        name or (folder.resolve().name if folder.exists() else model),
        GenerationSettings(ceiling, dial, eps_b, strict_only),
        limits,
        key=key,
        hosts=hosts,
        log_text=log_text,
    )
    logs.configure()
    app = create_app(network, tokens, settings)
    bound.listen()  # from here on connections wait, and are not refused
    where = f"[{host}]" if ":" in host else host
    print(f'Serving "{settings.name}" at http://{where}:{bound.getsockname()[1]}', flush=True)
    if key is None and not server.is_local(host):
        logs.log.warning("no_key", message="Anybody who can reach this address may use the model; set DYNAMO_API_KEY.")
    server.serve(app, bound, limits.seconds)
