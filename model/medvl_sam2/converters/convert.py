"""Convert one published checkpoint into part folders: plan everything first, then stream tensor by tensor."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from medvl_sam2.checkpoint import WEIGHTS_FILE
from medvl_sam2.config import ModelConfig
from medvl_sam2.converters.keymap import Plan, plan
from medvl_sam2.converters.kinds import known_kind
from medvl_sam2.converters.layout import Target
from medvl_sam2.converters.parts import PartTarget, write_part_config
from medvl_sam2.converters.source import WeightSource
from medvl_sam2.errors import CheckpointError
from medvl_sam2.files import write_json_atomically

SHARD_BYTES = 2 * 2**30
"""Tensors of one part are collected up to this size and then written; the most that lies in memory for a part."""
REPORT_FILE = "conversion.json"


@dataclass(frozen=True)
class ConvertedPart:
    """One part folder: its tensors, the numbers in them and their bytes."""

    folder: Path
    tensors: int
    numbers: int
    bytes: int


@dataclass(frozen=True)
class Conversion:
    """What :func:`convert` did.

    ``targets``: ``part/our name`` by published name; ``dropped``: reason by published name; ``ignored``: entries of
    the file that are no weights; ``appended``: vocabulary entries that got the mean of the others.
    """

    kind: str
    source: Path
    parts: Mapping[str, ConvertedPart]
    targets: Mapping[str, str]
    dropped: Mapping[str, str]
    ignored: tuple[str, ...]
    appended: int


def convert(
    source: WeightSource,
    kind: str,
    out: Path,
    *,
    config: ModelConfig | None = None,
    progress: Callable[[int, int], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Conversion:
    """Write the parts that ``source`` fills below ``out``, which must not exist yet; it appears whole or not at all.

    ``config`` replaces the published sizes of the kind; ``progress`` gets the tensors done and the tensors in all.

    Raises:
        CheckpointError: the kind is unknown, a tensor is missing, unused or misshapen, the source is damaged, or
            ``out`` exists.
    """
    out = Path(out)
    if out.exists():
        raise CheckpointError(f"{out} exists; name a new folder, or remove it first")
    target, matched = plan_conversion(source, kind, config)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        writers = {part: _PartWriter(staging / part, wanted, shard_bytes) for part, wanted in target.parts.items()}
        for done, (name, tensor) in enumerate(source.read(list(matched.targets)), start=1):
            part, _, ours = matched.targets[name].partition("/")
            writers[part].add(ours, tensor)
            if progress is not None:
                progress(done, len(matched.targets))
        parts = {part: writer.finish(out / part) for part, writer in writers.items()}
        vocabularies = [wanted.vocabulary for wanted in target.parts.values() if wanted.vocabulary is not None]
        appended = sum(len(v.tokenizer) - v.known for v in vocabularies)
        result = Conversion(kind, source.path, parts, matched.targets, matched.dropped, source.ignored, appended)
        write_json_atomically(staging / REPORT_FILE, conversion_json(result))
        staging.chmod(0o755)
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return result


def plan_conversion(source: WeightSource, kind: str, config: ModelConfig | None = None) -> tuple[Target, Plan]:
    """What :func:`convert` would do, without reading a tensor; raises :class:`CheckpointError` where it would."""
    target = known_kind(kind)(source, config)
    expected = {
        f"{part}/{name}": info for part, wanted in target.parts.items() for name, info in wanted.expected.items()
    }
    return target, plan(source.tensors, target.keys, expected, f"{source.path} as {kind}")


def conversion_json(result: Conversion) -> dict[str, object]:
    """Plain JSON values; paths as text."""
    parts = {
        name: {"folder": part.folder.name, "tensors": part.tensors, "numbers": part.numbers, "bytes": part.bytes}
        for name, part in result.parts.items()
    }
    return {
        "kind": result.kind,
        "source": str(result.source),
        "parts": parts,
        "targets": dict(result.targets),
        "dropped": dict(result.dropped),
        "ignored": list(result.ignored),
        "appended_vocabulary": result.appended,
    }


class _PartWriter:
    """Collects the tensors of one part and writes a shard whenever enough have come."""

    def __init__(self, folder: Path, target: PartTarget, shard_bytes: int) -> None:
        folder.mkdir()
        self._folder, self._target, self._limit = folder, target, shard_bytes
        self._held: dict[str, Tensor] = {}
        self._shards: dict[str, str] = {}
        self._size = self._tensors = self._numbers = self._bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if self._target.vocabulary is not None and name in self._target.growing:
            tensor = self._target.vocabulary.grow(tensor)
        if name in self._target.numbers:
            tensor = tensor.reshape(1)
        size = tensor.numel() * tensor.element_size()
        if self._held and self._size + size > self._limit:
            self._flush()
        self._held[name] = tensor.contiguous()
        self._size += size
        self._bytes += size
        self._tensors += 1
        self._numbers += tensor.numel()

    def finish(self, final: Path) -> ConvertedPart:
        self._flush()
        files = sorted(set(self._shards.values()))
        if len(files) == 1:
            (self._folder / files[0]).rename(self._folder / WEIGHTS_FILE)
        else:
            index = {"metadata": {"total_size": self._bytes}, "weight_map": self._shards}
            (self._folder / f"{WEIGHTS_FILE}.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
        write_part_config(self._folder, self._target)
        return ConvertedPart(final, self._tensors, self._numbers, self._bytes)

    def _flush(self) -> None:
        if not self._held:
            return
        file = f"model-{len(set(self._shards.values())) + 1:05d}.safetensors"
        save_file(self._held, self._folder / file, metadata={"format": "pt"})
        (self._folder / file).chmod(0o644)  # safetensors makes it readable by the owner alone
        self._shards |= dict.fromkeys(self._held, file)
        self._held, self._size = {}, 0
