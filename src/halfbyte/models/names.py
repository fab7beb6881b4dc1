"""What transformers calls a parameter in memory and in a folder, which differs for some architectures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.layers import Experts

_EXPERT = re.compile(r"(?P<experts>.*\.experts)\.(?P<number>\d+)\.(?P<matrix>\w+)\.(?P<rest>.+)")


class Names:
    """The two names of a model's parameters. In memory those of experts are as `Experts` has them, experts.3.gate_proj;
    in a folder each has a name too, which may be another (Mixtral's w1), where transformers knows one."""

    def __init__(self, model: nn.Module) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        known: list[Any] = get_model_conversion_mapping(model, add_legacy=False)  # pyright: ignore[reportArgumentType]
        self._renamed = [t for t in known if type(t) is WeightRenaming]
        self._back = [t.reverse_transform() for t in self._renamed[::-1]]
        self._matrices: dict[str, str] = {}  # of an expert: name in a folder -> in memory
        self._experts = {name: m for name, m in model.named_modules() if isinstance(m, Experts)}
        for t in known:
            if isinstance(t, WeightConverter):
                self._learn(t.source_patterns, t.target_patterns[0].rpartition(".")[2])

    def _learn(self, sources: list[str], target: str) -> None:
        """From what transformers fuses (experts.*.w1.weight, experts.*.w3.weight -> experts.gate_up_proj)."""
        for m in self._experts.values():
            matrices = m.fused.parameters.get(target, ())
            if len(matrices) == len(sources):
                names = [s.removesuffix(".weight").rpartition(".")[2] for s in sources]
                self._matrices |= dict(zip(names, matrices, strict=True))

    def held(self, name: str) -> str:
        """A name in a folder -> the name in memory."""
        for t in self._renamed:
            name = t.rename_source_key(name)[0]
        return self._matrix(name, self._matrices)

    def stored(self, name: str) -> str:
        """A name in memory -> the name in a folder that transformers writes, and `held` takes back."""
        out = self._matrix(name, {held: stored for stored, held in self._matrices.items()})
        for t in self._back:
            out = t.rename_source_key(out)[0]
        return out if self.held(out) == name else name

    def fused(self, name: str) -> tuple[str, int, int, int] | None:
        """Of an expert's parameter: the fused one's name, which expert it is of, and which of how many matrices."""
        m = _EXPERT.fullmatch(name)
        if m is None or m["experts"] not in self._experts:
            return None
        suffix = {"weight": "", "bias": "_bias"}.get(m["rest"], "?")
        for target, matrices in self._experts[m["experts"]].fused.parameters.items():
            if m["matrix"] in matrices:
                i = matrices.index(m["matrix"])
                return f"{m['experts']}.{target}{suffix}", int(m["number"]), i, len(matrices)
        return None

    def together(self, codes: Iterable[str]) -> set[str]:
        """Which fused parameters are so in a folder: those of floats, where transformers has no name for each expert's
        matrices, or there are codes beside them, which it then looks for in the experts too. codes: names of the ops
        whose weights are none."""
        codes = list(codes)
        apart = {m["experts"] for n in codes if (m := _EXPERT.fullmatch(f"{n}.weight"))}
        whole = {n: m for n, m in self._experts.items() if n not in apart and (codes or not self._matrices)}
        return {f"{n}.{p}{end}" for n, m in whole.items() for p in m.fused.parameters for end in ("", "_bias")}

    def folder(self, tensors: Iterable[tuple[str, Tensor]], together: set[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors by their names in memory -> by those in a folder; parts of what is `together` in one, once all are
        there."""
        waiting: dict[str, dict[tuple[int, int], Tensor]] = {}
        for name, t in tensors:
            where = self.fused(name)
            if where is None or where[0] not in together:
                yield self.stored(name), t
                continue
            target, expert, i, n = where
            parts = waiting.setdefault(target, {})
            parts[expert, i] = t
            of = self._experts[target.rpartition(".")[0]]
            if len(parts) == len(of) * n:
                whole = [of.fused.join([parts.pop((e, j)) for j in range(n)]) for e in range(len(of))]
                yield self.stored(target), torch.stack(whole)

    def _matrix(self, name: str, by: dict[str, str]) -> str:
        m = _EXPERT.fullmatch(name)
        return f"{m['experts']}.{m['number']}.{by.get(m['matrix'], m['matrix'])}.{m['rest']}" if m else name
