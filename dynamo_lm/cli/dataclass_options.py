"""Command-line options from dataclasses: every option is declared once, as the field that it fills.

    @dataclass(frozen=True, kw_only=True)
    class ComputeOptions:
        PANEL: ClassVar[str] = "Machine"  # the heading of these options in --help

        device: Annotated[str, "cpu, cuda, cuda:1, .. or auto."] = "auto"  # --device TEXT
        dry_run: Annotated[bool, "Train nothing."] = False  # --dry-run; a bool is a switch without --no-...
        max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Longest answer.", min=1)] = 64
        keep: int = 2  # no help: not an option; keeps its default

    @dataclass_options
    def command(model: Model, compute: ComputeOptions, *, json: Annotated[bool, "Print JSON."] = False) -> None:
        ...  # compute.device

    app.command()(command)

A string in `Annotated` is the option's help; a `typer.Option` or `typer.Argument` in its place has the last word on names,
range and metavar. Parameters of the command that are not dataclasses follow the same rules. A default of the parameter
(`compute: ComputeOptions = FAST`, an instance) replaces the defaults of the fields. Dataclasses may inherit, also from a
dataclass of the library (without PANEL), whose fields then need no declaration here and come last in --help;
`__post_init__` may raise `InputError`.
`command.__wrapped__` is the function that takes dataclasses. Types are read at import: no torch, no TYPE_CHECKING imports.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import MISSING, fields, is_dataclass, replace
from functools import wraps
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from typer.models import ParameterInfo


def dataclass_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give typer a command whose parameters are the fields of `command`'s dataclasses."""
    hints = get_type_hints(command, include_extras=True)
    flat: list[inspect.Parameter] = []
    groups: dict[str, tuple[Any, list[str]]] = {}  # parameter -> class or instance to fill, its options
    for parameter in inspect.signature(command).parameters.values():
        hint = hints[parameter.name]
        if is_dataclass(hint):
            defaults = hint if parameter.default is parameter.empty else parameter.default
            options = list(_options(hint, defaults))
            groups[parameter.name] = defaults, [option.name for option in options]
            flat += options
        else:
            flat.append(_parameter(parameter.name, _with_option(parameter.name, hint, None), parameter.default))

    @wraps(command)
    def run(**values: Any) -> None:
        filled = {}
        for name, (defaults, options) in groups.items():
            chosen = {option: values.pop(option) for option in options}
            filled[name] = defaults(**chosen) if isinstance(defaults, type) else replace(defaults, **chosen)
        command(**values, **filled)

    run.__signature__ = inspect.Signature(flat)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in flat}
    return run


def _options(kind: Any, defaults: Any) -> Iterator[inspect.Parameter]:
    """The fields that have a help text, as parameters; those of the library last."""
    hints = get_type_hints(kind, include_extras=True)
    library = {
        field.name for base in kind.__mro__ if is_dataclass(base) and not hasattr(base, "PANEL") for field in fields(base)
    }
    for field in sorted(fields(kind), key=lambda field: field.name in library):
        if get_origin(hints[field.name]) is not Annotated:
            continue
        if defaults is not kind:
            default = getattr(defaults, field.name)
        elif field.default_factory is not MISSING:
            default = field.default_factory()
        else:
            default = inspect.Parameter.empty if field.default is MISSING else field.default
        yield _parameter(field.name, _with_option(field.name, hints[field.name], getattr(kind, "PANEL", None)), default)


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _with_option(name: str, annotation: Any, panel: str | None) -> Any:
    """`Annotated[type, "help"]` as `Annotated[type, typer.Option(help="help", ...)]`, under the heading `panel`."""
    if get_origin(annotation) is not Annotated:
        return annotation
    kind, about = get_args(annotation)[:2]
    if isinstance(about, ParameterInfo):
        option = copy(about)
    else:
        names = [f"--{name.replace('_', '-')}"] if kind is bool else []
        option = typer.Option(*names, help=about)
    option.rich_help_panel = option.rich_help_panel or panel
    return Annotated[kind, option]
