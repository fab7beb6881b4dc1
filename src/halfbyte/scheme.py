"""Which weight gets which format: ordered rules, the first that matches wins. Presets carry the field's names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import Any, ClassVar

from halfbyte.errors import InputError
from halfbyte.formats import FORMATS, Format, parse

# What a matrix is for; models.py says which is which.
ROLES = ("linear", "conv1d", "expert", "convolution", "embedding", "position", "head", "router")
_MULTIPLIED = ("linear", "conv1d", "expert")  # what a preset quantizes
_SMALLER = (128, 64, 32)  # what a preset's group falls back to where it does not divide a layer's inputs


def static(input: Format | None) -> bool:
    """Whether inputs in a format are rounded by one scale for all of them, which calibration finds and the model keeps;
    others are rounded by scales of each token."""
    return input is not None and input.group == "tensor"


@dataclass(frozen=True)
class Rule:
    """match: "@role", or a regular expression for the whole module name. weight: a format, or None to keep.
    input: the format that inputs are rounded to at run time (see `static`). why: said in every listing."""

    match: str
    weight: Format | None
    input: Format | None = None
    why: str = ""

    def matches(self, name: str, role: str) -> bool:
        return self.match == f"@{role}" or (self.match[:1] != "@" and bool(re.fullmatch(self.match, name)))


@dataclass(frozen=True)
class Scheme:
    """fits: whether a group that does not divide a layer may become a smaller one (presets) or is an error. alone:
    whether no folder of others must hold the result: a group may then become a whole row, where no smaller one divides,
    and convolutions round their inputs too."""

    name: str
    rules: tuple[Rule, ...]
    fits: bool = False
    alone: bool = False

    @property
    def static(self) -> bool:
        """Whether it takes calibration to find the scales of inputs."""
        return any(static(r.input) for r in self.rules)

    def rule(self, name: str, role: str) -> Rule | None:
        """The first that matches a weight."""
        return next((r for r in self.rules if r.matches(name, role)), None)

    def decide(self, name: str, role: str, shape: tuple[int, ...], widths: Sequence[int] = ()) -> Rule:
        """The rule for one weight, its group made to fit. widths: the inputs of all that get groups, for a size that
        serves them too, in the message. Raises InputError if none matches, or a group that was asked for does not
        divide the layer's inputs."""
        rule = self.rule(name, role)
        if rule is None:
            raise InputError(
                f"scheme {self.name} says nothing of {name} ({role}); add a rule that keeps or quantizes it."
            )
        f = rule.weight
        if f is None or not isinstance(f.group, int) or f.flat or shape[-1] % f.group == 0:
            return rule
        group = next((g for g in _SMALLER if g < f.group and shape[-1] % g == 0), None)
        by_row = f.name.replace(f"-g{f.group}", "-channel")
        if self.fits and self.alone and group is None and by_row != f.name:
            return replace(rule, weight=parse(by_row), why=f"by channel: {f.group} does not divide {shape[-1]}")
        if not self.fits or group is None:
            raise InputError(
                f"{name}: a group of {f.group} does not divide its {shape[-1]} inputs; choose --group-size "
                f"{_largest_divisor(gcd(shape[-1], *widths), f.group)} or a scheme by channel."
            )
        return replace(
            rule, weight=f.with_group(group), why=f"groups of {group}: {f.group} does not divide {shape[-1]}"
        )

    def notation(self) -> Any:
        """What `scheme` (a name) or `custom` (rules) makes the same scheme from, as JSON holds it."""
        if self.name in SCHEMES or self.name in FORMATS:
            return self.name
        return [
            {
                "match": r.match,
                "weight": r.weight and r.weight.name,
                "input": r.input and r.input.name,
                "why": r.why,
            }
            for r in self.rules
        ]

    def everywhere(self) -> Scheme:
        """The same scheme for a module that no folder layout must hold: convolutions get the formats of linear layers,
        and rows that no group divides one scale."""
        as_linear = next((r for r in self.rules if r.match == "@linear"), None)
        rules = tuple(replace(as_linear, match=r.match) if as_linear and r is _CONVOLUTION else r for r in self.rules)
        return replace(self, rules=rules, alone=True)

    def with_group(self, group: int) -> Scheme:
        """The same scheme with a group size that the user gave: never changed to fit a layer."""
        if group < 1:
            raise InputError(f"--group-size must be at least 1, not {group}.")
        rules = tuple(
            replace(r, weight=r.weight.with_group(group)) if r.weight and isinstance(r.weight.group, int) else r
            for r in self.rules
        )
        if rules == self.rules and not any(r.weight and r.weight.group == group for r in rules):
            raise InputError(f"--group-size {group}: scheme {self.name} has no groups.")
        return replace(self, name=f"{self.name}-g{group}", rules=rules, fits=False)


@dataclass(frozen=True)
class Part:
    """What a mix must know of a weight: its place in GGUF's terms (attn_v, ffn_down, token_embd, output ...), its
    layer and how many there are, its inputs, and how many heads share a key."""

    name: str
    place: str
    layer: int
    layers: int
    inputs: int
    sharing: int = 1


Which = Callable[[Part], bool]


def _all(part: Part) -> bool:
    return True


def _first(share: int) -> Which:
    return lambda part: part.layer < part.layers // share


def _before(n: int) -> Which:
    return lambda part: part.layer < n


def _more(part: Part) -> bool:
    """The layers at both ends, and every third between."""
    eighth = part.layers // 8
    return part.layer < eighth or part.layer >= 7 * part.layers // 8 or (part.layer - eighth) % 3 == 2


def _shared(part: Part) -> bool:
    """Where at least 4 heads share a key and a value."""
    return part.sharing >= 4


@dataclass(frozen=True)
class Mix:
    """One of the mixes that llama.cpp's users know by name: a format for all, better ones at some places. What it
    makes of a model depends on the model's layers, so it becomes a Scheme only there.

    better: (place, which of those, format), the first that meets. head: of the head, or of the embedding that is one.
    """

    name: str
    base: str
    better: tuple[tuple[str, Which, str], ...] = ()
    head: str = "q6_k"
    static: ClassVar[bool] = False  # inputs stay as they are

    def on(self, parts: Sequence[Part]) -> Scheme:
        """The scheme for a model of these parts: a rule for each."""
        head = next((p.name for p in parts if p.place == "output"), None)
        head = head or next((p.name for p in parts if p.place == "token_embd"), None)
        return Scheme(self.name, tuple(self._rule(p, p.name == head) for p in parts))

    def _rule(self, part: Part, head: bool) -> Rule:
        if part.place in ("position_embd", "ffn_gate_inp"):
            return Rule(re.escape(part.name), None, why=f"{part.place}: small, and never quantized by llama.cpp")
        name, why = (self.head, "head") if head else (self.base, "")
        for place, meets, better in () if head else self.better:
            if place == part.place and meets(part):
                name, why = better, f"{place}: worth more bits"
                break
        f = parse(name)
        if part.inputs % _SUPER_BLOCK and name in _NARROWER:
            f, why = parse(_NARROWER[name]), f"{_SUPER_BLOCK} does not divide {part.inputs} inputs"
        return Rule(re.escape(part.name), f, why=why)

    def notation(self) -> str:
        return self.name


_SUPER_BLOCK = 256
_NARROWER = {"q2_k": "iq4_nl", "q3_k": "iq4_nl", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}  # llama.cpp's
MIXES: dict[str, Mix] = {
    m.name: m
    for m in (
        Mix("Q8_0", "q8_0", head="q8_0"),
        Mix("Q4_0", "q4_0"), Mix("Q4_1", "q4_1"), Mix("Q5_0", "q5_0"), Mix("Q5_1", "q5_1"), Mix("IQ4_NL", "iq4_nl"),
        Mix("MXFP4", "mxfp4", head="q8_0"),
        Mix("Q2_K", "q2_k", (("attn_v", _shared, "q4_k"), ("attn_v", _all, "q3_k"), ("ffn_down", _all, "q3_k"),
                             ("attn_output", _all, "q3_k"))),
        Mix("Q3_K_S", "q3_k"),
        Mix("Q3_K_M", "q3_k", (("attn_v", _before(2), "q5_k"), ("attn_v", _all, "q4_k"), ("attn_qkv", _all, "q4_k"),
                               ("ffn_down", _first(16), "q5_k"), ("ffn_down", _all, "q4_k"),
                               ("attn_output", _all, "q4_k"))),
        Mix("Q3_K_L", "q3_k", (("attn_v", _all, "q5_k"), ("attn_qkv", _all, "q4_k"), ("ffn_down", _all, "q5_k"),
                               ("attn_output", _all, "q5_k"))),
        Mix("Q4_K_S", "q4_k", (("attn_v", _before(4), "q5_k"), ("ffn_down", _first(8), "q5_k"))),
        Mix("Q4_K_M", "q4_k", (("attn_v", _more, "q6_k"), ("ffn_down", _more, "q6_k"), ("attn_qkv", _all, "q5_k"))),
        Mix("Q5_K_S", "q5_k"),
        Mix("Q5_K_M", "q5_k", (("attn_v", _more, "q6_k"), ("ffn_down", _more, "q6_k"), ("attn_qkv", _all, "q6_k"))),
        Mix("Q6_K", "q6_k"),
    )
}  # fmt: skip


def _largest_divisor(n: int, most: int) -> int:
    return next(g for g in range(min(n, most), 0, -1) if n % g == 0)


_CONVOLUTION = Rule("@convolution", None, why="convolution: small, and no folder layout of others has a place for it")
_KEPT = (
    Rule("@embedding", None, why="embedding: a look-up, read one row at a time; its error reaches every layer"),
    Rule("@head", None, why="head: its error goes straight into the logits"),
    Rule("@router", None, why="router: small, and a wrong choice of expert costs more than it saves"),
    Rule("@position", None, why="position: small, and added to all that the model is fed"),
    _CONVOLUTION,
)


def _uniform(name: str, weight: str, input: str | None = None, fits: bool = False) -> Scheme:
    f_in = None if input is None else parse(input)
    rules = tuple(Rule(f"@{role}", parse(weight), f_in) for role in _MULTIPLIED)
    return Scheme(name, (*_KEPT, *rules), fits)


SCHEMES: dict[str, Scheme] = {
    s.name: s
    for s in (
        # in groups, not by channel as elsewhere: 0.1 bit a weight buys half of the loss (KL 0.0015 against 0.0030 on
        # SmolLM2), and a preset called lossless should be it
        _uniform("W8A16", "int8-g128", fits=True),
        _uniform("W8A8", "int8-channel", "int8-token"),
        _uniform("W8A8_STATIC", "int8-channel", "int8-tensor"),
        _uniform("W4A16", "int4-g128", fits=True),
        _uniform("W4A16_ASYM", "uint4-g128", fits=True),
        _uniform("W4A8", "int4-g128", "int8-token", fits=True),
        _uniform("W3A16", "int3-g128", fits=True),
        _uniform("W2A16", "int2-g64", fits=True),
        _uniform("NF4", "nf4-g64"),
        _uniform("NF4_DQ", "nf4-g64-dq"),
        _uniform("FP4", "fp4-bnb-g64"),
        _uniform("LLM_INT8", "int8-bnb"),
        _uniform("FP8", "fp8-e4m3-channel", "fp8-e4m3-token"),
        _uniform("FP8A16", "fp8-e4m3-channel"),
        _uniform("NVFP4A16", "nvfp4"),
        _uniform("MXFP4A16", "mxfp4"),
    )
}


def scheme(name: str | Scheme | Mix, group_size: int | None = None) -> Scheme | Mix:
    """A scheme or a mix by preset name (any case) or by a format's name: that format on every linear layer,
    embeddings, head and routers kept. Raises InputError with the nearest name for one that is unknown."""
    found = name if isinstance(name, Scheme | Mix) else _named(name)
    if group_size is None:
        return found
    if isinstance(found, Mix):
        raise InputError(f"--group-size {group_size}: the groups of {found.name} are part of its formats.")
    return found.with_group(group_size)


def _named(name: str) -> Scheme | Mix:
    if name in set(FORMATS):  # q4_0 is the format, on linear layers; Q4_0 the mix of that name
        return _uniform(name, name)
    for table in (SCHEMES, MIXES):
        for n, s in table.items():
            if n.lower() == name.lower().replace("-", "_"):
                return s
    if name.lower() in FORMATS:
        return _uniform(name.lower(), name.lower())
    known = [*SCHEMES, *MIXES, *FORMATS]
    near = difflib.get_close_matches(name.lower(), [k.lower() for k in known], 1, 0.3)
    nearest = next((k for k in known if near and k.lower() == near[0]), None)
    hint = f"; did you mean {nearest}?" if nearest else "."
    raise InputError(f"{name!r} is no scheme{hint} Schemes are {', '.join([*SCHEMES, *MIXES])}, or any format's name.")


def custom(rules: Any) -> Scheme:
    """A scheme from a list of rules, each a mapping with "match" and, if wanted, "weight", "input", "why".
    Raises InputError for another key or an unknown format."""
    if not isinstance(rules, list):
        raise InputError(f"a scheme is a name or a list of rules, not {rules!r}.")
    made = []
    for r in rules:
        if not isinstance(r, dict) or "match" not in r or set(r) - {"match", "weight", "input", "why"}:
            raise InputError(f"a rule of a scheme has the keys match, weight, input and why, not {r}.")
        if wrong := next((k for k, v in r.items() if not isinstance(v, str | None)), None):
            raise InputError(f"a rule of a scheme: {wrong} is a text, not {r[wrong]!r}.")
        weight, input = (None if r.get(k) is None else parse(r[k]) for k in ("weight", "input"))
        made.append(Rule(_pattern(r["match"]), weight, input, r.get("why") or "named by the scheme"))
    return Scheme("custom", tuple(made))


def _pattern(match: str | None) -> str:
    """A rule's `match`, checked. Raises InputError."""
    if not match or (match[0] == "@" and match[1:] not in (*ROLES, "other")):
        raise InputError(f"a rule of a scheme matches @{', @'.join(ROLES)} or a regular expression, not {match!r}.")
    try:
        re.compile(match)
    except re.error as e:
        raise InputError(f"a rule of a scheme: {match!r} is no regular expression: {e}.") from None
    return match


def to_scheme(given: Any, group_size: int | None = None) -> Scheme | Mix:
    """A scheme's name, a Scheme, or a recipe's own list of rules {match, weight, input, why}. Raises InputError."""
    if isinstance(given, str | Scheme | Mix):
        return scheme(given, group_size)
    own = custom(given)
    return own if group_size is None else own.with_group(group_size)


def check_static(chosen: Scheme | Mix, text: Any) -> None:
    """Raises InputError where a scheme has static inputs and there is no text to find their scales on."""
    if chosen.static and not text:
        raise InputError(
            f"{chosen.name} rounds inputs by scales that are found on text: quantizing to it needs --calibration FILE."
        )
