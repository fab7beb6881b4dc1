"""Which weight gets which format: ordered rules, the first that matches wins. Presets carry the field's names."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from typing import Any

from halfbyte.errors import InputError
from halfbyte.formats import FORMATS, Format, parse

# What a matrix is for; models.py says which is which.
ROLES = ("linear", "conv1d", "embedding", "head", "router")
_SMALLER = (128, 64, 32)  # what a preset's group falls back to where it does not divide a layer's inputs


@dataclass(frozen=True)
class Rule:
    """match: "@role", or a regular expression for the whole module name. weight: a format, or None to keep.
    input: the format that inputs are rounded to at run time. why: said in every listing."""

    match: str
    weight: Format | None
    input: Format | None = None
    why: str = ""

    def matches(self, name: str, role: str) -> bool:
        return self.match == f"@{role}" or (self.match[:1] != "@" and bool(re.fullmatch(self.match, name)))


@dataclass(frozen=True)
class Scheme:
    """fits: whether a group that does not divide a layer may become a smaller one (presets) or is an error."""

    name: str
    rules: tuple[Rule, ...]
    fits: bool = False

    def decide(self, name: str, role: str, shape: tuple[int, ...]) -> Rule:
        """The rule for one weight, its group made to fit. Raises InputError if none matches, or a group that
        was asked for does not divide the layer's inputs."""
        rule = next((r for r in self.rules if r.matches(name, role)), None)
        if rule is None:
            raise InputError(
                f"scheme {self.name} says nothing of {name} ({role}); add a rule that keeps or quantizes it."
            )
        f = rule.weight
        if f is None or not isinstance(f.group, int) or f.flat or shape[-1] % f.group == 0:
            return rule
        group = next((g for g in _SMALLER if g < f.group and shape[-1] % g == 0), None)
        if not self.fits or group is None:
            raise InputError(
                f"{name}: a group of {f.group} does not divide its {shape[-1]} inputs; choose --group-size "
                f"{_largest_divisor(shape[-1], f.group)} or a scheme by channel."
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


def _largest_divisor(n: int, most: int) -> int:
    return next(g for g in range(min(n, most), 0, -1) if n % g == 0)


_KEPT = (
    Rule("@embedding", None, why="embedding: a look-up, read one row at a time; its error reaches every layer"),
    Rule("@head", None, why="head: its error goes straight into the logits"),
    Rule("@router", None, why="router: small, and a wrong choice of expert costs more than it saves"),
)


def _uniform(name: str, weight: str, input: str | None = None, fits: bool = False) -> Scheme:
    f_in = None if input is None else parse(input)
    rules = tuple(Rule(f"@{role}", parse(weight), f_in) for role in ("linear", "conv1d"))
    return Scheme(name, (*_KEPT, *rules), fits)


SCHEMES: dict[str, Scheme] = {
    s.name: s
    for s in (
        # in groups, not by channel as elsewhere: 0.1 bit a weight buys half of the loss (KL 0.0015 against 0.0030 on
        # SmolLM2), and a preset called lossless should be it
        _uniform("W8A16", "int8-g128", fits=True),
        _uniform("W8A8", "int8-channel", "int8-token"),
        _uniform("W4A16", "int4-g128", fits=True),
        _uniform("W4A16_ASYM", "uint4-g128", fits=True),
        _uniform("W4A8", "int4-g128", "int8-token", fits=True),
        _uniform("W3A16", "int3-g128", fits=True),
        _uniform("W2A16", "int2-g64", fits=True),
        _uniform("NF4", "nf4-g64"),
        _uniform("NF4_DQ", "nf4-g64-dq"),
        _uniform("FP4", "fp4-bnb-g64"),
        _uniform("FP8", "fp8-e4m3-channel", "fp8-e4m3-token"),
        _uniform("FP8A16", "fp8-e4m3-channel"),
    )
}


def scheme(name: str | Scheme, group_size: int | None = None) -> Scheme:
    """A scheme by preset name (any case) or by a format's name: that format on every linear layer, embeddings,
    head and routers kept. Raises InputError with the nearest name for one that is unknown."""
    if isinstance(name, Scheme):
        found = name
    else:
        found = next((s for n, s in SCHEMES.items() if n.lower() == name.lower().replace("-", "_")), None)
        if found is None and name.lower() in FORMATS:
            found = _uniform(name.lower(), name.lower())
        if found is None:
            known = [*SCHEMES, *FORMATS]
            near = difflib.get_close_matches(name.lower(), [k.lower() for k in known], 1, 0.3)
            nearest = next((k for k in known if near and k.lower() == near[0]), None)
            hint = f"; did you mean {nearest}?" if nearest else "."
            raise InputError(f"{name!r} is no scheme{hint} Schemes are {', '.join(SCHEMES)}, or any format's name.")
    return found if group_size is None else found.with_group(group_size)


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
