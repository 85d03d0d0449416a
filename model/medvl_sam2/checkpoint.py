"""Checkpoint directories: written whole or not at all, verified when read.

A checkpoint is a directory of four files: ``model.safetensors`` (floating parameters as fp16), ``config.json``,
``tokenizer.json`` and ``meta.json`` (provenance and the SHA-256 of the weights). Nothing is ever unpickled.

A checkpoint may carry a folder ``alignment``: the image-text model of the alignment stage, in the same four files.
:mod:`medvl_sam2.publishing` serves checkpoints from a store.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from medvl_sam2.config import ModelConfig
from medvl_sam2.errors import CheckpointError, ConfigError
from medvl_sam2.files import file_sha256, sync_path

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
META_FILE = "meta.json"
ALIGNMENT_FOLDER = "alignment"

_FP16_MAX = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class CheckpointMeta:
    """Where weights come from. ``version`` is ``"<n>"`` once published; ``parent`` the version they grew from."""

    name: str
    version: str
    notice: str
    """Plain words on what the weights were trained on; shown with every text answer."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    parent: str | None = None
    created: str = ""
    """UTC, ISO 8601; filled in when saved."""
    sha256: str = ""
    """Of ``model.safetensors``; filled in when saved."""


class Checkpoint(NamedTuple):
    """What :func:`load_checkpoint` returns: fp32 CPU ``state`` by parameter name, and all that belongs to it."""

    state: dict[str, torch.Tensor]
    config: ModelConfig
    tokenizer_path: Path
    meta: CheckpointMeta


def shipped_checkpoint(name: str = "demo") -> Path:
    """Directory of the weights shipped with the package; :class:`CheckpointError` when they are not there."""
    path = Path(__file__).parent / "weights" / name
    if not (path / WEIGHTS_FILE).is_file():
        raise CheckpointError(f"the package ships no weights named {name!r}; reinstall it, or train a checkpoint first")
    return path


def save_checkpoint(
    directory: Path,
    model_state: Mapping[str, torch.Tensor],
    config: ModelConfig,
    tokenizer_path: Path,
    meta: CheckpointMeta,
    overwrite: bool = False,
    alignment: Path | None = None,
) -> CheckpointMeta:
    """Write a checkpoint directory that appears complete or not at all; return the meta as stored.

    Floating tensors are stored as fp16, others as they are; tensors that share memory (tied weights) are stored once.
    ``alignment``: checkpoint folder of an image-text model to carry along, where there is one; default: the one in the
    ``directory`` that is overwritten.

    Raises:
        CheckpointError: ``directory`` exists and ``overwrite`` is off, the tokenizer is missing, a weight is not
            finite or too large for fp16, or the image-text model is damaged.
    """
    directory = Path(directory)
    if directory.exists() and not overwrite:
        raise CheckpointError(f"{directory} exists already; choose another directory or pass overwrite=True")
    if not Path(tokenizer_path).is_file():
        raise CheckpointError(f"tokenizer {tokenizer_path} is not a file; give the tokenizer.json the model uses")
    tensors, tied = _storable(model_state)
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        save_file(tensors, staging / WEIGHTS_FILE, metadata={"format": "pt", "tied": json.dumps(tied)})
        (staging / CONFIG_FILE).write_text(config.to_json(), encoding="utf-8")
        shutil.copyfile(tokenizer_path, staging / TOKENIZER_FILE)
        stored = dataclasses.replace(
            meta,
            created=meta.created or datetime.now(UTC).isoformat(timespec="seconds"),
            sha256=file_sha256(staging / WEIGHTS_FILE),
        )
        write_meta(staging, stored)
        carry_alignment(alignment or directory / ALIGNMENT_FOLDER, staging)
        settle(staging, directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return stored


def read_meta(directory: Path) -> CheckpointMeta:
    """Read ``meta.json`` alone (cheap); :class:`CheckpointError` when missing or malformed."""
    path = Path(directory) / META_FILE
    data = read_json(path, "restore the checkpoint directory from a copy, or train again")
    known = {f.name for f in dataclasses.fields(CheckpointMeta)}
    missing = {"name", "version", "notice", "sha256"} - set(data)
    unknown = set(data) - known
    if missing or unknown:
        wrong = f"lacks {sorted(missing)[0]!r}" if missing else f"has the unknown field {sorted(unknown)[0]!r}"
        raise CheckpointError(f"{path} {wrong}; it was written by another release: use that one or save again")
    return CheckpointMeta(**data)


def verify_checkpoint(directory: Path) -> CheckpointMeta:
    """Check that all four files are there and that the weights have the recorded SHA-256; return the meta.

    An image-text model in the folder ``alignment`` is checked in the same way, and that it is one.
    """
    directory = Path(directory)
    for name in (WEIGHTS_FILE, CONFIG_FILE, TOKENIZER_FILE, META_FILE):
        if not (directory / name).is_file():
            raise CheckpointError(f"{directory} lacks {name}; a checkpoint is a directory with all four files")
    meta = read_meta(directory)
    actual = file_sha256(directory / WEIGHTS_FILE)
    if actual != meta.sha256:
        raise CheckpointError(
            f"{directory / WEIGHTS_FILE} has SHA-256 {actual[:12]}..., meta.json says {meta.sha256[:12]}...: "
            "the file is damaged or was replaced; copy the directory again as a whole"
        )
    beside = directory / ALIGNMENT_FOLDER
    if beside.is_dir():
        verify_checkpoint(beside)
        if read_config(beside).alignment is None:
            raise CheckpointError(f"{beside} holds no image-text model; put the folder of an alignment stage there")
    return meta


def load_checkpoint(directory: Path) -> Checkpoint:
    """Read and verify a checkpoint directory. Floating tensors come back as fp32 on the CPU.

    Raises:
        CheckpointError: a file is missing, torn, damaged, or not of this format.
    """
    directory = Path(directory)
    meta = verify_checkpoint(directory)
    config = read_config(directory)
    state: dict[str, torch.Tensor] = {}
    try:
        with safe_open(directory / WEIGHTS_FILE, framework="pt", device="cpu") as file:
            tied: dict[str, str] = json.loads((file.metadata() or {}).get("tied", "{}"))
            for key in file.keys():  # noqa: SIM118 - safe_open is not a mapping
                tensor = file.get_tensor(key)
                state[key] = tensor.float() if tensor.is_floating_point() else tensor
        for alias, source in tied.items():
            state[alias] = state[source]
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{directory / WEIGHTS_FILE} is no safetensors file of this project: {error}") from error
    return Checkpoint(state, config, directory / TOKENIZER_FILE, meta)


def load_into(module: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Copy ``state`` into ``module``; every key and shape must match.

    Raises:
        CheckpointError: names the first missing and the first unused key, or the first shape that differs.
    """
    own = module.state_dict()
    missing = sorted(set(own) - set(state))
    unused = sorted(set(state) - set(own))
    if missing or unused:
        parts = []
        if missing:
            parts.append(f"{len(missing)} weights are missing, first {missing[0]!r}")
        if unused:
            parts.append(f"{len(unused)} weights are unused, first {unused[0]!r}")
        raise CheckpointError(
            f"checkpoint does not fit the model: {'; '.join(parts)}. Build the model from the config.json beside the "
            "weights, or convert the checkpoint"
        )
    for key in sorted(own):
        if own[key].shape != state[key].shape:
            raise CheckpointError(
                f"weight {key!r} has shape {tuple(state[key].shape)}, the model wants {tuple(own[key].shape)}; "
                "build the model from the config.json beside the weights"
            )
    module.load_state_dict(dict(state), strict=True)


def _storable(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors to write, and alias -> stored name for those that are views of the same memory."""
    tensors: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for key in sorted(state):
        tensor = state[key].detach()
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and place in seen:
            tied[key] = seen[place]
            continue
        seen[place] = key
        if tensor.is_floating_point():
            if not torch.isfinite(tensor).all():
                raise CheckpointError(f"weight {key!r} is not finite; training diverged: lower the learning rate")
            if tensor.numel() and float(tensor.abs().max()) > _FP16_MAX:
                raise CheckpointError(f"weight {key!r} exceeds {_FP16_MAX:.0f} and does not fit fp16; rescale it")
            tensor = tensor.to(torch.float16)
        tensors[key] = tensor.cpu().contiguous().clone()
    return tensors, tied


def read_config(directory: Path) -> ModelConfig:
    """The configuration of a checkpoint folder alone; its weights are not looked at.

    Raises :class:`CheckpointError` when it does not fit this release, :class:`OSError` when it cannot be read.
    """
    try:
        return ModelConfig.from_json((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    except (ConfigError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{directory / CONFIG_FILE} does not fit this release: {error}") from error


# --- what publishing shares -------------------------------------------------------------------------------------------


def carry_alignment(folder: Path, staging: Path) -> None:
    """Copy the image-text model in ``folder``, if there is one, into the checkpoint ``staging``; it is verified."""
    if folder.is_dir():
        verify_checkpoint(folder)
        shutil.copytree(folder, staging / ALIGNMENT_FOLDER)


def write_meta(directory: Path, meta: CheckpointMeta) -> None:
    """Write ``meta.json``."""
    data = dataclasses.asdict(meta)
    data["metrics"] = dict(meta.metrics)
    (directory / META_FILE).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def settle(staging: Path, final: Path) -> None:
    """Flush ``staging`` to disk and give it its final name; an existing directory of that name is replaced."""
    os.chmod(staging, 0o755)
    for path in staging.rglob("*"):
        sync_path(path)
    sync_path(staging)
    if final.exists():
        # A non-empty directory cannot be replaced in one step: move it aside, and back again should the rename fail.
        aside = Path(tempfile.mkdtemp(prefix=f".{final.name}.old.", dir=final.parent)) / final.name
        os.rename(final, aside)
        try:
            os.rename(staging, final)
        except OSError:
            os.rename(aside, final)
            raise
        finally:
            shutil.rmtree(aside.parent, ignore_errors=True)
    else:
        os.rename(staging, final)
    sync_path(final.parent)


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """A JSON object; :class:`CheckpointError` with the ``remedy`` when it is missing or damaged."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); {remedy}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds {type(data).__name__}, not a JSON object; {remedy}")
    return data
