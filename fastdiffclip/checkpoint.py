"""What a run leaves on disk: written atomically, verified when read, never pickled.

A run folder holds ``model.safetensors``, ``config.yaml``, ``manifest.json``, ``metrics.json``, ``log.csv`` and
``checkpoints/``. A folder counts as finished once its manifest, written last, is there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiffclip import __version__
from fastdiffclip.config import Config, build_config, dump_config
from fastdiffclip.errors import InputDataError, ResourceError, UsageError
from fastdiffclip.files import write_atomic
from fastdiffclip.runtime import machine, versions

logger = logging.getLogger(__name__)
FORMAT = 1
MODEL, CONFIG, MANIFEST, METRICS, LOG = (
    "model.safetensors",
    "config.yaml",
    "manifest.json",
    "metrics.json",
    "log.csv",
)
CHECKPOINTS, KEEP = "checkpoints", 2
LOSSES, CHECK = "losses", "check"


@dataclass(frozen=True)
class Run:
    """A finished run as read back from its folder."""

    path: Path
    config: Config
    tensors: dict[str, Tensor]
    manifest: dict[str, Any]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Tensors whose name starts with ``prefix`` + ".", without it."""
        head = f"{prefix}."
        return {name[len(head) :]: tensor for name, tensor in self.tensors.items() if name.startswith(head)}

    def front_end_parts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Arrays and metadata from which the spectral front end is rebuilt."""
        return {name: tensor.numpy() for name, tensor in self.part("front_end").items()}, self.manifest["front_end"]


def new_run_path(scene: str, stage: str, root: Path = Path("runs")) -> Path:
    """``runs/<scene>/<stage>-<time>``, the default output folder."""
    return root / scene / f"{stage}-{time.strftime('%Y%m%d-%H%M%S')}"


def find_runs(scene_sha256: str | None, stage: str, root: Path = Path("runs")) -> list[Path]:
    """Finished runs of ``stage`` on a scene under ``root``, newest first."""
    found = []
    for manifest_path in root.glob(f"**/{MANIFEST}"):
        try:
            manifest = read_checked(manifest_path)
        except InputDataError as error:
            logger.warning("a run is passed over: %s", error)
            continue
        scenes = [scene.get("sha256") for scene in manifest.get("scenes", [])]
        if manifest.get("stage") == stage and (scene_sha256 is None or scene_sha256 in scenes):
            found.append((str(manifest.get("finished", "")), manifest_path.parent))
    return [path for _, path in sorted(found, reverse=True)]


def write_json(path: Path, value: Any) -> None:
    """:func:`write_atomic` of indented JSON."""
    write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def write_checked(path: Path, value: Mapping[str, Any]) -> dict[str, Any]:
    """:func:`write_json` of an object with a checksum of itself; returns what :func:`read_checked` will."""
    plain: dict[str, Any] = json.loads(json.dumps(value))
    plain[CHECK] = _check(plain)
    write_json(path, plain)
    return plain


def read_checked(path: Path) -> dict[str, Any]:
    """What :func:`write_checked` wrote.

    Raises:
        InputDataError: the file is missing, is no JSON object, or differs from its checksum.
    """
    value = read_json(path)
    if value.get(CHECK) != _check(value):
        raise InputDataError(f"{path} does not match its own checksum: it is damaged or was changed")
    return value


def _check(value: Mapping[str, Any]) -> str:
    rest = {key: entry for key, entry in value.items() if key != CHECK}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def pack_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """safetensors bytes of CPU copies."""
    from safetensors.torch import save

    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def read_verified(path: Path, sha256: str | None) -> bytes:
    """The bytes of a file of a run; None leaves the checksum out. Raises as :func:`unpack_tensors`."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputDataError(f"{path} is missing; a run folder holds {MODEL}, {CONFIG} and {MANIFEST}") from None
    except OSError as error:
        raise InputDataError(f"{path} cannot be read: {error.strerror}") from None
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise InputDataError(f"{path} does not match the checksum in its manifest: it is damaged or was changed")
    return data


def unpack_tensors(path: Path, sha256: str | None) -> dict[str, Tensor]:
    """Tensors of a safetensors file whose checksum is verified.

    Raises:
        InputDataError: the file is missing, damaged, or differs from its checksum.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(read_verified(path, sha256))
    except SafetensorError as error:
        raise InputDataError(f"{path} is not a whole safetensors file: {error}") from None


def save_run(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Config,
    *,
    stage: str,
    seed: int,
    scenes: list[dict[str, Any]],
    losses: list[float],
    identity: str,
    extra: Mapping[str, Any],
    first_step: float | None = None,
) -> dict[str, Any]:
    """Write a finished run; returns its manifest. Checkpoints are removed once it stands.

    ``first_step``: seconds from the start of the process to the end of its first step, None when it took none.
    """
    data = pack_tensors({**tensors, LOSSES: torch.tensor(losses, dtype=torch.float64)})
    metrics = {
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "steps": len(losses),
        "seconds_to_first_step": None if first_step is None else round(first_step, 3),
    }
    settings = dump_config(config).encode()
    write_atomic(folder / MODEL, data)
    write_atomic(folder / CONFIG, settings)
    write_json(folder / METRICS, metrics)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "stage": stage,
        "fastdiffclip": __version__,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seed": seed,
        "scenes": scenes,
        "fingerprint": identity,
        "sha256": {MODEL: hashlib.sha256(data).hexdigest(), CONFIG: hashlib.sha256(settings).hexdigest()},
        "versions": versions(),
        "machine": machine(),
        **extra,
    }
    manifest = write_checked(folder / MANIFEST, manifest)
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    return manifest


def load_run(folder: Path, stage: str) -> Run:
    """Read a finished run back.

    Raises:
        InputDataError: the folder is no finished run of ``stage``, or a file of it is damaged.
    """
    import yaml

    manifest_path = folder / MANIFEST
    if not manifest_path.is_file():
        raise InputDataError(f"{folder} is not a finished run: it has no {MANIFEST}")
    manifest = read_checked(manifest_path)
    if manifest.get("stage") != stage or manifest.get("format") != FORMAT:
        raise InputDataError(
            f"{folder} holds a run of stage {manifest.get('stage')!r}, format {manifest.get('format')}; "
            f"expected stage {stage!r}, format {FORMAT}"
        )
    tensors = unpack_tensors(folder / MODEL, manifest["sha256"][MODEL])
    try:
        settings = read_verified(folder / CONFIG, manifest["sha256"][CONFIG])
        config = build_config(yaml.safe_load(settings.decode()) or {})
    except (OSError, ValueError, AttributeError, UsageError, yaml.YAMLError) as error:
        raise InputDataError(f"{folder / CONFIG} cannot be read: {error}") from None
    return Run(folder, config, tensors, manifest)


def save_checkpoint(folder: Path, step: int, tensors: Mapping[str, Tensor], fingerprint: str) -> None:
    """Write ``checkpoints/<step>`` atomically and keep the one before it.

    What is there of later steps did not read back when this run resumed, and goes, too. Raises
    :class:`ResourceError` when the disk is full; nothing of the step is left then, and what was there stays.
    """
    path = folder / CHECKPOINTS / f"{step:09d}.safetensors"
    data = pack_tensors(tensors)
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        write_atomic(path, data)
        write_checked(path.with_suffix(".json"), {"step": step, "fingerprint": fingerprint, "sha256": sha256})
    except ResourceError:
        path.unlink(missing_ok=True)
        raise
    unpack_tensors(path, sha256)  # before an older one goes: does it read back?
    before = sorted((other.stem for other in path.parent.glob("*.json") if other.stem < path.stem), reverse=True)
    kept = {path.stem, *before[: KEEP - 1]}
    for other in path.parent.glob("*"):  # with files of which a kill left one alone
        if other.stem not in kept and other.suffix in (".json", ".safetensors"):
            other.unlink()


def latest_checkpoint(folder: Path, fingerprint: str) -> tuple[int, dict[str, Tensor]] | None:
    """The newest checkpoint that is whole, or None.

    Raises:
        UsageError: it was made with other settings or data than ``fingerprint`` stands for.
    """
    for path in sorted((folder / CHECKPOINTS).glob("*.json"), reverse=True):
        try:
            meta = read_checked(path)
            tensors = unpack_tensors(path.with_suffix(".safetensors"), meta["sha256"])
        except InputDataError as error:
            logger.warning("a checkpoint is passed over: %s", error)
            continue
        check_same(folder, meta.get("fingerprint"), fingerprint)
        return int(meta["step"]), tensors
    return None


def finished_run(folder: Path, fingerprint: str) -> dict[str, Tensor] | None:
    """The tensors of the finished run that ``folder`` holds, or None.

    Raises:
        UsageError: it was made with other settings or data than ``fingerprint`` stands for.
        InputDataError: a file of it is damaged.
    """
    if not (folder / MANIFEST).is_file():
        return None
    manifest = read_checked(folder / MANIFEST)
    check_same(folder, manifest.get("fingerprint"), fingerprint)
    return unpack_tensors(folder / MODEL, manifest["sha256"][MODEL])


def check_same(folder: Path, found: Any, fingerprint: str) -> None:
    """Raise :class:`UsageError` unless what a folder holds belongs to the run that asks for it."""
    if found != fingerprint:
        raise UsageError(
            f"{folder} was started with other settings, scenes or seed; resume with the same, or give another --out"
        )


def optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as named tensors."""
    state = optimiser.state_dict()["state"]
    return {f"optimiser.{index}.{key}": value for index, entry in state.items() for key, value in entry.items()}


def restore_optimiser(optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put the tensors of :func:`optimiser_tensors` back."""
    whole = optimiser.state_dict()
    whole["state"] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimiser."):
            _, index, key = name.split(".")
            whole["state"].setdefault(int(index), {})[key] = tensor
    optimiser.load_state_dict(whole)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises :class:`InputDataError` when it is missing or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputDataError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise InputDataError(f"{path} should hold a JSON object")
    return value
