"""Every key of `core.config.Config` by its dotted name: its type, default and sentence, read off the Structs."""

from typing import Any, NamedTuple, get_args, get_type_hints

import msgspec
import msgspec.inspect as inspect

from core.config import Config


class ConfigError(ValueError):
    """A configuration that cannot run. The message names key, value, bound and remedy; the process exits with 2."""


class Key(NamedTuple):
    """One setting.

    Example: Key(name="algorithm.steps", annotation=Annotated[int, Meta(ge=1)], kind=IntType(ge=1), default=80,
                 sentence="Training steps T.")
    """

    name: str
    annotation: Any
    kind: inspect.Type
    default: Any
    sentence: str

    @property
    def choices(self) -> tuple[str, ...]:
        """The words of a Literal, in the order they were declared; empty for other types."""
        return get_args(get_args(self.annotation)[0]) if isinstance(self.kind, inspect.LiteralType) else ()

    @property
    def takes_text(self) -> bool:
        """True where an unquoted word on the command line is the value itself."""
        return isinstance(self.kind, inspect.StrType | inspect.LiteralType)

    @property
    def expected(self) -> str:
        """What a value must be, such as `an integer >= 1`."""
        if self.choices:
            return "one of " + ", ".join(f'"{choice}"' for choice in self.choices)
        return _expected(self.kind, self.name)


def _expected(kind: inspect.Type, name: str) -> str:
    match kind:
        case inspect.LiteralType():
            return " or ".join(f'"{choice}"' for choice in kind.values)
        case inspect.IntType() | inspect.FloatType():
            noun = "an integer" if isinstance(kind, inspect.IntType) else "a number"
            return noun + _bounds({">": kind.gt, ">=": kind.ge, "<": kind.lt, "<=": kind.le})
        case inspect.BoolType():
            return "true or false"
        case inspect.StrType(min_length=least):
            return "a non-empty string" if least else "a string"
        case inspect.VarTupleType(item_type=inspect.LiteralType(values=words)):
            return "a list of " + " and ".join(f'"{word}"' for word in words) + f', such as ["{words[0]}"]'
        case inspect.VarTupleType():
            return "a list of integers, such as [1, 2, 4]"
        case inspect.UnionType():
            return " or ".join(_expected(part, name) for part in kind.types)
    raise AssertionError(f"{name} has a type that help and errors cannot name: {kind}")


def _bounds(limits: dict[str, float | None]) -> str:
    given = [f"{sign} {limit:g}" for sign, limit in limits.items() if limit is not None]
    return " " + " and ".join(given) if given else ""


def all_keys() -> dict[str, Key]:
    """Every key in the order of core/config.py."""
    return _keys_of(Config(), "")


def _keys_of(values: msgspec.Struct, prefix: str) -> dict[str, Key]:
    found: dict[str, Key] = {}
    for field, annotation in get_type_hints(type(values), include_extras=True).items():
        name, value = prefix + field, getattr(values, field)
        if isinstance(value, msgspec.Struct):
            found |= _keys_of(value, name + ".")
        else:
            kind = inspect.type_info(annotation)
            assert isinstance(kind, inspect.Metadata), f"{name} has no Meta"
            sentence = (kind.extra_json_schema or {})["description"]
            found[name] = Key(name, annotation, kind.type, value, sentence)
    return found


def section_of(name: str) -> str:
    """The table a key stands in: `correction.explorer` for `correction.explorer.weight`."""
    return name.rpartition(".")[0]
