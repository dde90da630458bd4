"""From a YAML file and ``key=value`` overrides to checked `Options`."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from .options import ConstraintOptions, Options

CONFIGS = Path(__file__).parent / "configs"
#: Cost functions that need nothing but the name.
BUILTIN_COSTS = ("length", "sentiment", "profanity", "kl")


class ConfigError(ValueError):
    """An option that is unknown, of the wrong type or outside its range."""


@contextmanager
def loading(option: str, allowed: str) -> Iterator[None]:
    """Around what loads something by a name that the user gave: that it cannot is told in a line.

    Raises:
        ConfigError: It cannot; names ``option``, and says what is ``allowed``.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        first = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise ConfigError(f"{option} cannot be loaded ({first}); allowed: {allowed}") from error


def config_path(name: str) -> Path:
    """The file called ``name``, or the shipped config of that name.

    Raises:
        ConfigError: Neither exists.
    """
    for path in (Path(name), CONFIGS / f"{name}.yaml"):
        with suppress(OSError):  # such as a name that is too long for one
            if path.is_file():
                return path
    shipped = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml")))
    raise ConfigError(f"config {name!r} is not a file; allowed: a YAML file, or a shipped config ({shipped})")


def load_options(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Options:
    """Defaults, then the YAML file, then ``key=value`` overrides, checked.

    Args:
        path: A YAML file, the name of a shipped config, or None for the defaults alone.
        overrides: Such as ``"optim.steps=100"`` or ``"constraints.length.lower=18"``.

    Returns:
        The options.

    Raises:
        ConfigError: Names the key, what was given and what is allowed.

    Example:
        >>> load_options(None, ["optim.steps=100"]).optim.steps
        100
    """
    merged = OmegaConf.structured(Options)
    for given in (_read(path), _dotlist(overrides)):
        _check_keys(given, Options)
        _check_types(given, merged)
        for part in ("rule", "schedule", "estimator"):
            named = OmegaConf.select(given, f"objective.{part}")
            if named not in (None, merged.objective[part]):
                merged.objective[f"{part}_options"] = {}  # another class has other arguments
        merged = OmegaConf.merge(merged, given)
    options = OmegaConf.to_object(merged)
    assert isinstance(options, Options)
    for key, spec, value in leaves(options):
        _check_range(key, spec.metadata, value)
    for name, constraint in options.constraints.items():
        _check_constraint(options, name, constraint)
    if options.keep_best and not options.constraints:
        raise ConfigError("keep_best=True without constraints; allowed: with at least one, which a state can meet")
    return options


def to_yaml(options: Options) -> str:
    """The options as the YAML file that gives them back."""
    return OmegaConf.to_yaml(OmegaConf.structured(options))


def option_table() -> str:
    """The Markdown table of all options, for the documentation."""
    rows = ["| option | type | default | meaning |", "|---|---|---|---|"]
    for key, spec, kind, default in _table(Options()):
        shown = json.dumps(default) if default is None or isinstance(default, bool | str | dict) else str(default)
        rows.append(f"| `{key}` | {kind} | `{shown}` | {spec.metadata['help']}{_allowed_range(spec.metadata)} |")
    return "\n".join(rows)


def _table(options: Any, prefix: str = "") -> Iterator[tuple[str, Field[Any], str, Any]]:
    hints = get_type_hints(type(options))
    for spec in fields(options):
        value, key = getattr(options, spec.name), prefix + spec.name
        if spec.name == "constraints":
            yield from _table(ConstraintOptions(), "constraints.NAME.")
        elif is_dataclass(value):
            yield from _table(value, key + ".")
        else:
            yield key, spec, _type_name(hints[spec.name]), value


def _type_name(hint: Any) -> str:
    if getattr(hint, "__origin__", None) is dict:
        return "mapping"
    names = [getattr(kind, "__name__", str(kind)) for kind in get_args(hint) or (hint,)]
    return " or ".join("null" if name == "NoneType" else name for name in names)


def _read(path: str | Path | None) -> DictConfig:
    if path is None:
        return OmegaConf.create({})
    file = config_path(str(path))
    try:
        given = OmegaConf.load(file)
    except (YAMLError, OmegaConfBaseException, RecursionError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid YAML: {error}") from None
    except (OSError, ValueError, TypeError) as error:  # what OmegaConf says about a number, a date, a number as a key
        raise ConfigError(f"{file}: {error}; allowed: a mapping of options") from None
    if not isinstance(given, DictConfig):
        raise ConfigError(f"{file}: holds a list; allowed: a mapping of options")
    _refuse_resolvers(given)
    return given


def _dotlist(overrides: Sequence[str]) -> DictConfig:
    for text in overrides:
        key, equals, _ = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {text!r}; allowed: key=value, such as optim.steps=100")
    try:
        given = OmegaConf.from_dotlist(list(overrides))
    except (YAMLError, GrammarParseError, OmegaConfBaseException, RecursionError, ValueError, TypeError) as error:
        raise ConfigError(f"overrides {list(overrides)}: {error}") from None
    _refuse_resolvers(given)
    return given


def _refuse_resolvers(given: Any, prefix: str = "") -> None:
    """A configuration is data: ``${oc.env:...}`` and other functions are not called, and secrets not written out."""
    if not isinstance(given, DictConfig | ListConfig) or given._is_none() or given._is_interpolation():
        text = given if isinstance(given, str) else getattr(given, "_value", lambda: None)()
        if isinstance(text, str) and re.search(r"\$\{[^}]*(:|\$\{)", text):
            raise ConfigError(
                f"{prefix}={text!r}; allowed: plain values, or ${{another.option}}; functions such as oc.env are not "
                "called (let the shell fill in what it knows)"
            )
        return
    keys: Any = given if isinstance(given, DictConfig) else range(len(given))
    for key in keys:
        _refuse_resolvers(given._get_node(key), f"{prefix}.{key}" if prefix else str(key))


def _check_keys(given: DictConfig, kind: type, prefix: str = "") -> None:
    """Unknown keys, before OmegaConf sees them: with the full key and the nearest known one."""
    hints, known = get_type_hints(kind), [spec.name for spec in fields(kind)]
    for raw in given:
        name = str(raw)
        key, value = prefix + name, given._get_node(raw)
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else ""
            raise ConfigError(f"unknown option {key!r}{hint} allowed here: {', '.join(known)}")
        inner = ConstraintOptions if name == "constraints" else hints[name]
        if not is_dataclass(inner):
            continue
        entries = {key: value}
        if name == "constraints":
            _require_mapping(key, value)
            entries = {f"{key}.{sub}": value._get_node(sub) for sub in value}  # type: ignore[union-attr]
        for full, entry in entries.items():
            _require_mapping(full, entry)
            _check_keys(entry, inner, full + ".")  # type: ignore[arg-type]


def _require_mapping(key: str, value: Any) -> None:
    if not isinstance(value, DictConfig) or value._is_none():
        raise ConfigError(f"{key} is {value}; allowed: a mapping of options")


def _check_types(given: DictConfig, schema: Any) -> None:
    try:
        OmegaConf.to_container(OmegaConf.merge(schema, given), resolve=True)
    except OmegaConfBaseException as error:
        key = error.full_key or "config"
        value = OmegaConf.select(given, key, throw_on_resolution_failure=False) if error.full_key else None
        first = str(error.msg or error).splitlines()[0]
        raise ConfigError(f"{key}={value!r}: {first}; allowed: see `barrierlm options`") from None


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Field[Any], Any]]:
    """Key, field and value of every option."""
    for spec in fields(node):
        value, key = getattr(node, spec.name), prefix + spec.name
        if is_dataclass(value):
            yield from leaves(value, key + ".")
        elif spec.name == "constraints":
            for name, constraint in value.items():
                yield from leaves(constraint, f"{key}.{name}.")
        else:
            yield key, spec, value


def _allowed_range(metadata: Mapping[str, Any]) -> str:
    if "choices" in metadata:
        return f" ({', '.join(metadata['choices'])})"
    limits = (("low", ">="), ("above", ">"), ("below", "<"))
    text = " and ".join(f"{sign} {metadata[key]}" for key, sign in limits if key in metadata)
    return f" ({text})" if text else ""


def _check_range(key: str, metadata: Mapping[str, Any], value: Any) -> None:
    if value is None or isinstance(value, bool | dict):
        return
    bad = (
        ("choices" in metadata and value not in metadata["choices"])
        or (isinstance(value, float) and not math.isfinite(value))
        or ("low" in metadata and value < metadata["low"])
        or ("above" in metadata and not value > metadata["above"])
        or ("below" in metadata and not value < metadata["below"])
    )
    if bad:
        allowed = _allowed_range(metadata).strip(" ()") or "a finite number"
        raise ConfigError(f"{key}={value!r}; allowed: {allowed}")


def _check_constraint(options: Options, name: str, constraint: ConstraintOptions) -> None:
    from barrierlm import Constraint

    key = f"constraints.{name}"
    try:
        Constraint(name, lower=constraint.lower, upper=constraint.upper, scale=constraint.scale)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from None
    cost = constraint.cost = constraint.cost or name
    if cost not in BUILTIN_COSTS and ":" not in cost:
        raise ConfigError(
            f"{key}.cost={cost!r}; allowed: {', '.join(BUILTIN_COSTS)}, path/to/file.py:function, "
            "package.module:function or reward_model:NAME"
        )
    if cost == "kl" and options.model.lora_rank == 0:
        raise ConfigError(
            f"{key}.cost='kl' with model.lora_rank=0; allowed: LoRA (lora_rank > 0), whose adapters are switched "
            "off to get the starting model without a second copy"
        )
    cap = options.rollout.max_new_tokens
    if cost == "length" and cap < 2 * (constraint.upper or constraint.lower or 0):
        raise ConfigError(
            f"rollout.max_new_tokens={cap} with a length bound of {constraint.upper or constraint.lower:g}; allowed: "
            "at least twice the bound, or censored responses hide the violation"
        )
