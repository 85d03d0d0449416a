"""Key maps as data, and the one engine that applies them and lets nothing pass in silence.

A :class:`KeyMap` is an ordered list of rules. The first rule whose pattern fits a whole published name decides: it
renames the tensor or drops it for a stated reason. :func:`plan` checks the outcome against the names and shapes of the
module that is to receive it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from medvl_sam2.converters.source import TensorInfo
from medvl_sam2.errors import CheckpointError

SHOWN = 5
"""Names of each kind of misfit that a message spells out; the rest is counted."""


@dataclass(frozen=True)
class Rename:
    """A published name (regular expression) and what it is called here (with group references)."""

    pattern: str
    target: str


@dataclass(frozen=True)
class Drop:
    """A published name (regular expression) that has no use here, and why."""

    pattern: str
    reason: str


KeyMap = tuple[Rename | Drop, ...]


@dataclass(frozen=True)
class Plan:
    """``targets``: our name by published name; ``dropped``: the reason by published name."""

    targets: Mapping[str, str]
    dropped: Mapping[str, str]


def plan(found: Mapping[str, TensorInfo], keys: KeyMap, expected: Mapping[str, TensorInfo], what: str) -> Plan:
    """Match every published tensor with one that is ``expected``; ``what`` names the weights in messages.

    Raises:
        CheckpointError: a tensor is missing, unused, there twice, or of another shape or type; all kinds of misfit are
            in one message.
    """
    rules = [(re.compile(rule.pattern), rule) for rule in keys]
    targets: dict[str, str] = {}
    dropped: dict[str, str] = {}
    sources: dict[str, str] = {}
    unused, twice, misshapen = [], [], []
    for name, info in found.items():
        match, rule = next(((m, r) for p, r in rules if (m := p.fullmatch(name))), (None, None))
        if isinstance(rule, Drop):
            dropped[name] = rule.reason
            continue
        target = match.expand(rule.target) if match is not None and isinstance(rule, Rename) else None
        if target is None or target not in expected:
            unused.append(repr(name) if target is None else f"{name!r} (here {target!r})")
        elif target in sources:
            twice.append(f"{name!r} and {sources[target]!r} (both here {target!r})")
        else:
            if info != expected[target]:
                misshapen.append(f"{name!r} is {_kind(info)}, wanted {_kind(expected[target])}")
            targets[name] = target
            sources[target] = name
    missing = [repr(name) for name in expected if name not in sources]
    misfits = [
        _listed(missing, "missing"),
        _listed(unused, "unused"),
        _listed(twice, "there twice"),
        _listed(misshapen, "of another shape or type"),
    ]
    if any(misfits):
        raise CheckpointError(
            f"{what}: {'; '.join(part for part in misfits if part)}. Check the kind and the size; a key that a new "
            "release added needs a rule in medvl_sam2.converters"
        )
    return Plan(targets, dropped)


def _kind(info: TensorInfo) -> str:
    return f"{'floating' if info.floating else 'whole numbers'} {info.shape}"


def _listed(names: Sequence[str], what: str) -> str:
    if not names:
        return ""
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} weights are {what}: {', '.join(names[:SHOWN])}{rest}"
