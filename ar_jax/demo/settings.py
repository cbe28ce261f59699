"""What can be set of a model's drawing, from the same parts and docstrings as the options of `sample.py`; as values by name,
as the query of a link, as a `Sampling`.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints
from urllib.parse import parse_qsl, quote, urlencode

from ar_jax.config import CONFIGS
from ar_jax.decode.sampling import Sampling
from ar_jax.options import Fields, changes, described, fields_of, read_numbers, replaced, sampling_file, show_numbers
from ar_jax.sampler import Drawer
from ar_jax.typing import Within

OWN = "own"  # the model's own way, beside those that files make of it
NUMBERS = {"count": 4, "seed": 0}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One thing to set.

    Attributes:
      name: such as "guidance.weight".
      kind: bool, int, float or str; rows of numbers are text, as on a command line.
      value: the model's own.
      doc: what the docstrings say of it.
      choices: of text, where there are only some.
      least, most: of a number.
      turned: compiled programs take any value of it.
      ways: those that have it.
    """

    name: str
    kind: type
    value: Any
    doc: str = ""
    choices: tuple[str, ...] = ()
    least: float = -math.inf
    most: float = math.inf
    turned: bool = False
    ways: tuple[str, ...] = (OWN,)

    def read(self, value: Any) -> Any:
        """A value, from a page or a link.

        Raises:
          ValueError: this setting takes no such value.
        """
        try:
            if self.kind is bool:
                found = {"true": True, "false": False}[str(value).lower()]
            elif self.kind is int:
                found = int(value) if not isinstance(value, float) or value.is_integer() else int(str(value))
            else:
                found = self.kind(value)
        except (ValueError, KeyError, TypeError, OverflowError):
            raise ValueError(f"{self.name} is {value!r}; it must be {WORDS[self.kind]}") from None
        if self.choices and found not in self.choices:
            raise ValueError(f"{self.name} is {value!r}; it must be one of {', '.join(self.choices)}")
        if self.kind in (int, float) and not self.least <= found <= self.most:
            raise ValueError(f"{self.name} is {found}; it must be {self.least:g} to {self.most:g}")
        return found


WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


@dataclasses.dataclass(frozen=True)
class Choice:
    """How to draw: one of the ways, and settings that differ from it."""

    way: str = OWN
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Wish:
    """All that a link holds.

    Attributes:
      labels, captions: conditions, used in turn.
      count, seed: of the images.
      choice: how to draw.
      other: what that is compared with, or None.
    """

    labels: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()
    count: int = NUMBERS["count"]
    seed: int = NUMBERS["seed"]
    choice: Choice = Choice()
    other: Choice | None = None


class Board:
    """All that can be set of a model. What the command line asked for is where it begins.

    Attributes:
      ways: "own" and the published files of `configs/sampling`, which take other parts.
      missing: why other files cannot be used here, such as for want of a judge's weights, by way.
      settings: by name, of all ways.
    """

    def __init__(self, drawer: Drawer):
        self._parts, own = (drawer.model.module, drawer.tokenizer.module, drawer.model.order), drawer.sampling
        files = sorted((CONFIGS / "sampling").glob("*.py"))
        ways = {OWN: own} | {file.stem: sampling_file(f"configs/sampling/{file.name}", own) for file in files}
        asked = drawer.model.module.conditioning.example()
        self.missing = {
            way: missing for way, sampling in ways.items() if way != OWN and (missing := _missing(sampling, asked))
        }
        self._ways = {
            way: (sampling, fields_of(sampling, self._parts)) for way, sampling in ways.items() if way not in self.missing
        }
        self.ways, self.settings = tuple(self._ways), {}
        idle = () if drawer.generator.spec.codes else ("filter", "soft")  # they speak of codes
        for way, (sampling, fields) in self._ways.items():
            for setting in (*walk(sampling), *walk(fields)):
                if setting.name.partition(".")[0] in idle:
                    continue
                setting = dataclasses.replace(setting, turned=setting.name in turned(sampling), ways=())
                known = self.settings.get(setting.name, setting)
                self.settings[setting.name] = dataclasses.replace(known, ways=(*known.ways, way))

    def setting(self, name: str) -> Setting:
        """The setting of a name.

        Raises:
          ValueError: the model has none.
        """
        if name not in self.settings:
            raise ValueError(f"there is no setting {name!r}; this model has {', '.join(self.settings)}")
        return self.settings[name]

    def sampling(self, choice: Choice) -> Sampling:
        """How images are drawn; settings that the way does not have are passed over.

        Raises:
          ValueError: no such way or setting, or a value that it does not take.
        """
        if choice.way in self.missing:
            raise ValueError(f"the way {choice.way!r} to sample cannot be used here: {self.missing[choice.way]}")
        if choice.way not in self.ways:
            raise ValueError(f"there is no way {choice.way!r} to sample; there are {', '.join(self.ways)}")
        sampling, fields = self._ways[choice.way]
        for name, value in choice.values.items():
            setting = self.setting(name)
            if choice.way not in setting.ways:
                continue
            value, owner = setting.read(value), name.partition(".")[0]
            if owner in Sampling.__dataclass_fields__:
                if setting.kind is str and not setting.choices:
                    value = read_numbers(value, name) if value else ()
                sampling = replaced(sampling, name, value)
            else:
                fields = replaced(fields, name, value)
        sampling = dataclasses.replace(sampling, fields=changes(sampling, self._parts, fields))
        sampling.adapted(*self._parts)
        return sampling

    def link(self, wish: Wish) -> str:
        """The query of an address that `read` makes the same wish of; what is the model's own is left out."""
        pairs = [(name, word) for name in ("labels", "captions") for word in getattr(wish, name)]
        pairs += [(name, getattr(wish, name)) for name, usual in NUMBERS.items() if getattr(wish, name) != usual]
        for prefix, choice in (("", wish.choice), ("b.", wish.other)):
            if choice is not None:
                pairs += [(f"{prefix}way", choice.way)] * bool(prefix or choice.way != OWN)
                pairs += [(prefix + name, _word(value)) for name, value in self.differing(choice).items()]
        return urlencode(pairs, quote_via=quote)

    def differing(self, choice: Choice) -> dict[str, Any]:
        """Values that are not the model's own."""
        values = {name: self.setting(name).read(value) for name, value in choice.values.items()}
        return {name: value for name, value in values.items() if value != self.settings[name].value}

    def read(self, query: str) -> Wish:
        """What a link asks for.

        Raises:
          ValueError: a name or a value that this model does not have.
        """
        given: dict[str, Any] = {"labels": (), "captions": ()}
        choices: dict[str, dict[str, Any]] = {"": {"values": {}}}
        for name, value in parse_qsl(query.removeprefix("?"), keep_blank_values=True):
            prefix = "b." if name.startswith("b.") else ""
            bare = name.removeprefix(prefix)
            if name in ("labels", "captions"):
                given[name] += (value,)
            elif name in NUMBERS:
                given[name] = Setting(name, int, NUMBERS[name], least=0, most=2**64 - 1).read(value)
            elif bare == "way":
                choices.setdefault(prefix, {"values": {}})["way"] = value
            else:
                choices.setdefault(prefix, {"values": {}})["values"][bare] = self.setting(bare).read(value)
        found = {prefix: Choice(**choice) for prefix, choice in choices.items()}
        for choice in found.values():
            self.sampling(choice)
        return Wish(**given, choice=found[""], other=found.get("b."))


def _missing(sampling, asked):
    """What a way to sample lacks with a model that is asked so (a batch), in a sentence; "" if nothing."""
    needs = getattr(getattr(sampling.decoder, "judge", None), "needs", ())
    if strange := sorted(set(needs) - set(asked)):
        return f"its judge looks at the {strange[0]}, but this model is not asked for one"
    try:
        sampling.weights()
    except ValueError as error:
        return str(error)
    return ""


def walk(value: Sampling | Fields, owner: str = "") -> Iterator[Setting]:
    """The settings that a dataclass comes to, and those of dataclasses in it; what is no number, text or choice is left out."""
    if not dataclasses.is_dataclass(value):  # a plain function
        return
    hints = get_type_hints(type(value), include_extras=True)
    for field in dataclasses.fields(value):
        inner, name = getattr(value, field.name), owner + field.name
        if dataclasses.is_dataclass(inner):
            yield from walk(inner, f"{name}.")
        elif name == "fields":
            continue  # of the model, which has settings of its own for them
        elif found := _setting(name, hints.get(field.name, type(inner)), inner, described(type(value), field.name)):
            yield found


def turned(sampling: Sampling) -> set[str]:
    """Settings that go into programs as arrays: rules give their numbers by step, and filters name their fields (`arrays`)."""
    found = {f"filter.{name}" for name in getattr(sampling.filter, "arrays", ())}
    for name in ("guidance", "temperature"):
        found |= {setting.name for setting in walk(getattr(sampling, name), f"{name}.")}
    return found


def _setting(name, hint, value, doc):
    least, most = -math.inf, math.inf
    if get_origin(hint) is Annotated:
        hint, *notes = get_args(hint)
        for note in notes:
            if isinstance(note, Within):
                least, most = note.least, note.most
            doc = getattr(note, "help", None) or doc
    if get_origin(hint) is Literal:
        return Setting(name, str, value, doc, get_args(hint))
    if get_origin(hint) is tuple or isinstance(value, tuple):
        numbers = all(isinstance(x, int) for x in value)
        return Setting(name, str, show_numbers(value), doc) if numbers else None
    kind = hint if hint in WORDS else type(value)
    return Setting(name, kind, value, doc, (), least, most) if kind in WORDS else None


def _word(value):
    return str(value).lower() if isinstance(value, bool) else str(value)
