"""A deployed model as a folder that another process loads, with or without this library.

model.onnx, model.xml and model.bin, model.pt2 or model.pte     the program, as its target writes it
artifact.json       inputs, outputs, preprocessing, class names, and what it needs: versions, processor
report.json         steps, figures, and the machine on which they were measured
example.npz         inputs to try it on, and expected.npz what the model made of them
run.py              a few lines that run it with the runtime alone: python run.py example.npz
SHA256SUMS          of all these files: sha256sum -c SHA256SUMS
latency.png         the targets that `slab deploy` timed
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from slabformer._defaults import Precision
from slabformer._extras import require
from slabformer._files import as_json, check_readable, replaced_folder
from slabformer.deployment.kinds import KINDS, KindName
from slabformer.deployment.targets.base import Target
from slabformer.deployment.targets.table import target_called
from slabformer.export.program import Program
from slabformer.export.signature import Port, Signature
from slabformer.measure.processor import architecture, instructions
from slabformer.settings import ClassNames, NonEmptyStr, NonNegativeFloat, Threads, checked, from_mapping
from slabformer.surgery.verify import VerificationError

MANIFEST, REPORT, EXAMPLE, EXPECTED, SCRIPT, SUMS = (
    "artifact.json",
    "report.json",
    "example.npz",
    "expected.npz",
    "run.py",
    "SHA256SUMS",
)
#: what `slab deploy` draws beside it afterwards
PICTURE = "latency.png"
#: of the folder's layout; another one is refused
FORMAT = 1
SUM = re.compile(r"([0-9a-f]{64})  ([\w.\-]+)")


class ArtifactError(RuntimeError):
    """A folder that cannot be used here: damaged, or written for another machine or other versions."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What ``artifact.json`` says.

    Attributes:
        format: Of the folder's layout.
        target: That wrote the program.
        kind: What it is for: a plain model, a language model's step, a detector.
        dtype: Of weights and arithmetic; inputs and outputs have dtypes of their own.
        signature: How it is called and what it returns.
        versions: Of the packages that loading imports.
        architecture: Of the processor, where the program holds for one.
        instructions: Of the processor, without which it does not run.
        rtol: Largest difference to the model that passes, relative to the outputs' scale.
        preprocessing: How images become inputs: size, mean, std, interpolation, crop.
        class_names: By label.
    """

    format: Literal[1] = 1
    target: NonEmptyStr
    kind: KindName = "model"
    dtype: Precision
    signature: Signature
    versions: dict[str, NonEmptyStr]
    architecture: str = ""
    instructions: list[NonEmptyStr] = field(default_factory=list)
    rtol: NonNegativeFloat
    preprocessing: dict[str, Any] = field(default_factory=dict)
    class_names: ClassNames = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """The manifest in the file ``path``.

        Raises:
            ArtifactError: If it is none that this version reads.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(values, Mapping) and values.get("format") != FORMAT:
                raise ArtifactError(
                    f"{path.parent} is of format {values.get('format')!r}, and this slabformer reads {FORMAT}; "
                    "load it with the version that wrote it, or write it again with `slab deploy`"
                )
            values = from_mapping(cls, {**values, "signature": _signature(values.get("signature"))})
            return cls(**values)
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            raise ArtifactError(f"{path} describes no deployed model: {' '.join(str(error).split())}") from error


def save_artifact(
    folder: Path,
    program: Path,
    manifest: Manifest,
    report: Mapping[str, Any],
    example: Sequence[Tensor],
    expected: Sequence[Tensor],
    *,
    overwrite: bool = False,
) -> Path:
    """Write the folder of a deployed model, all of it or nothing.

    Args:
        folder: To write.
        program: Folder of what the target wrote; it is copied.
        manifest: Of it.
        report: How it was made and measured.
        example: Inputs in order.
        expected: Outputs of the model for them, in order.
        overwrite: Replace a folder that this wrote.

    Raises:
        FileExistsError: If ``folder`` is a file, holds files of others, or is not empty without ``overwrite``.
        OSError: If it cannot be written.
    """
    numpy, signature = require("numpy", extra="export"), manifest.signature
    with replaced_folder(folder, owned_files(folder) if overwrite else None) as fresh:
        for file in program.iterdir():
            shutil.copy2(file, fresh / file.name)
        _save_arrays(numpy, fresh / EXAMPLE, signature.inputs, example)
        _save_arrays(numpy, fresh / EXPECTED, signature.outputs, expected)
        (fresh / MANIFEST).write_text(as_json(asdict(manifest)), encoding="utf-8")
        (fresh / REPORT).write_text(as_json(report), encoding="utf-8")
        script = target_called(manifest.target).opening(manifest.dtype) + KINDS[manifest.kind].ending
        (fresh / SCRIPT).write_text(script, encoding="utf-8")
        sums = [f"{_sha256(file)}  {file.name}\n" for file in sorted(fresh.iterdir())]
        (fresh / SUMS).write_text("".join(sums), encoding="utf-8")
    return folder


class LoadedModel(Program):
    """A deployed model from its folder, called as the model was.

    Attributes:
        folder: It was loaded from.
        manifest: What it is: dtype, preprocessing, class names, what it needs.
        report: How it was made and measured.
    """

    def __init__(self, folder: Path, manifest: Manifest, threads: int | None) -> None:
        run = target_called(manifest.target).load(folder, manifest.dtype, threads)
        super().__init__(manifest.signature, run)
        self.folder, self.manifest = folder, manifest
        self.report: dict[str, Any] = json.loads((folder / REPORT).read_text(encoding="utf-8"))


@checked
def load_deployed(path: str | Path, *, threads: Threads | None = None, check: bool = True) -> LoadedModel:
    """The model that :meth:`slabformer.deployment.deploy.Deployed.save` or ``slab deploy`` wrote into a folder.

    Checksums, versions and the processor are compared with what the folder says before anything of it is run.

    Args:
        path: The folder.
        threads: To compute with; the runtime's choice by default. Targets of torch take torch's.
        check: Run it on the example in the folder and compare, too.

    Returns:
        A module that takes the model's inputs and returns its outputs; those of several names come as a mapping.

    Raises:
        FileNotFoundError: If there is no such folder.
        ArtifactError: If it is damaged, or was written for another machine or other versions; says what to do.
        ImportError: If its runtime is missing; names the extra.
        VerificationError: If the example comes out otherwise.
    """
    folder = Path(path)
    check_readable(folder / MANIFEST, "deployed model")
    _check_sums(folder)
    manifest = Manifest.read(folder / MANIFEST)
    target = _target_of(folder, manifest)
    _check_machine(folder, manifest)
    _check_versions(folder, manifest, target)
    model = LoadedModel(folder, manifest, threads)
    if check:
        _check_example(model)
    return model


def _check_example(model: LoadedModel) -> None:
    manifest, numpy = model.manifest, require("numpy", extra="export")
    inputs, expected = (
        _load_arrays(numpy, model.folder / name, ports)
        for name, ports in ((EXAMPLE, manifest.signature.inputs), (EXPECTED, manifest.signature.outputs))
    )
    reference = Program(manifest.signature, lambda _: expected)
    names = [port.name for port in manifest.signature.inputs]
    try:
        KINDS[manifest.kind].compare(reference, model, [dict(zip(names, inputs, strict=True))], manifest.rtol)
    except VerificationError as error:
        raise VerificationError(
            f"{model.folder} computes something else here than where it was written: {error}; "
            "write it again on this machine with `slab deploy`"
        ) from error


def owned_files(folder: Path) -> set[str]:
    """Names of the files of the deployed model in ``folder``, by its checksums; none where there is none."""
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return set()
    return {SUMS, PICTURE, *(match[2] for line in lines if (match := SUM.fullmatch(line)))}


def _check_sums(folder: Path) -> None:
    """Refuse a folder in which a file is missing, new or altered."""
    try:
        lines = check_readable(folder / SUMS).read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{folder} is damaged: {SUMS} cannot be read; copy or write the folder again") from error
    expected = {match[2]: match[1] for line in lines if (match := SUM.fullmatch(line))}
    wrong = [
        name for name, digest in expected.items() if not (folder / name).is_file() or _sha256(folder / name) != digest
    ]
    missing = {MANIFEST, REPORT, SCRIPT} - set(expected)
    if wrong or missing or len(expected) != len(lines):
        what = ", ".join(wrong) or SUMS
        raise ArtifactError(f"{folder} is damaged: {what} is missing or altered; copy or write the folder again")


def _target_of(folder: Path, manifest: Manifest) -> Target:
    try:
        target = target_called(manifest.target)
    except ValueError as error:
        raise ArtifactError(f"{folder} is for a target that is not registered here: {error}") from error
    target.check_installed(to_write=False)
    return target


def _check_machine(folder: Path, manifest: Manifest) -> None:
    again = "run `slab deploy` on this machine"
    if manifest.architecture and manifest.architecture != architecture():
        raise ArtifactError(f"{folder} is for {manifest.architecture}, and this machine is {architecture()}; {again}")
    here = instructions()
    lacking = sorted(set(manifest.instructions) - set(here))
    if here and lacking:
        raise ArtifactError(
            f"{folder} was compiled for a processor with {', '.join(lacking)}, which this one lacks; {again}"
        )


def _check_versions(folder: Path, manifest: Manifest, target: Target) -> None:
    for package, wanted in manifest.versions.items():
        here = importlib.metadata.version(package)
        if target.same_version:
            if _numbers(here)[:2] != _numbers(wanted)[:2]:
                raise ArtifactError(
                    f"{folder} was compiled with {package} {wanted} and holds for that minor version alone, here is "
                    f"{here}; pip install '{package}=={wanted}', or run `slab deploy` here"
                )
        elif _numbers(here) < _numbers(wanted):
            raise ArtifactError(
                f"{folder} was written for {package} {wanted}, here is {here}; pip install '{package}>={wanted}'"
            )


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: 2.14.1+cpu is (2, 14, 1)."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def _signature(values: Any) -> Signature:
    """A signature as JSON gave it.

    Raises:
        ValueError: If it is none.
    """
    ports = {
        kind: tuple(Port(**from_mapping(Port, {**port, "shape": tuple(port["shape"])})) for port in values[kind])
        for kind in ("inputs", "outputs")
    }
    return Signature(**from_mapping(Signature, {**values, **ports}))


def _save_arrays(numpy: Any, path: Path, ports: Sequence[Port], tensors: Sequence[Tensor]) -> None:
    arrays = {port.name: tensor.detach().cpu().numpy() for port, tensor in zip(ports, tensors, strict=True)}
    numpy.savez(path, **arrays)


def _load_arrays(numpy: Any, path: Path, ports: Sequence[Port]) -> list[Tensor]:
    with numpy.load(path, allow_pickle=False) as arrays:
        return [torch.from_numpy(arrays[port.name]) for port in ports]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
