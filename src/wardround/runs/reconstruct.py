"""Reconstructs one input or many with a released model: what `wardround reconstruct` and `wardround.reconstruct` do."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Literal

from wardround.errors import StudyError, WardroundError
from wardround.imaging.readers.raw import ENDINGS
from wardround.runs.apply import Reconstruction, Reconstructor
from wardround.runs.releases import USED, ReleasedModel

_ENDINGS = (".nii.gz", ".nii", *ENDINGS)
Fallback = Literal["tv"]
PathLike = str | os.PathLike[str]


def reconstruct(
    model: PathLike,
    inputs: PathLike | Sequence[PathLike],
    out: PathLike,
    *,
    site: str | None = None,
    embedding: PathLike | None = None,
    dose: float | None = None,
    fallback: Fallback | None = None,
    adapt_to_scan: int | None = None,
    plugins: Collection[str] = (),
    weights: PathLike | None = None,
    told: Callable[[Reconstruction], None] = lambda _: None,
) -> tuple[Reconstruction, ...]:
    """Reconstruct `inputs` with a released model, each into a file of its own in the folder `out`.

    A single input (no sequence) is written to `out` itself where that ends in .nii or .nii.gz. For what an input can
    be, and for `site`, `embedding`, `dose`, `fallback`, `adapt_to_scan` and `weights`, see
    `wardround.runs.apply.Reconstructor`; `plugins` are names of installed plug-ins that may be imported, where the
    model's file names one. `told` is called after each. Raises `StudyError`, `DataError` and `GeometryError`; of
    several inputs those that can be are reconstructed first.

    >>> (image,) = reconstruct("out/models/federated.safetensors", "scan.nii.gz", "image.nii.gz")
    >>> image.output.name, image.output.exists()
    ('image.nii.gz', True)
    """
    reconstructor = Reconstructor(
        ReleasedModel.opened(Path(model), plugins),
        site=site,
        embedding=None if embedding is None else Path(embedding),
        dose=dose,
        fallback=fallback == "tv",
        adapt_to_scan=adapt_to_scan,
        weights=None if weights is None else Path(weights),
    )
    done, failed = reconstruct_all(reconstructor, inputs, out, told)
    if failed:
        reasons = "; ".join(f"{source}: {error}" for source, error in failed)
        count = len(done) + len(failed)
        raise StudyError(f"{len(failed)} of {count} inputs could not be reconstructed", detail=reasons)
    return tuple(done)


def reconstruct_all(
    reconstructor: Reconstructor,
    inputs: PathLike | Sequence[PathLike],
    out: PathLike,
    told: Callable[[Reconstruction], None],
) -> tuple[list[Reconstruction], list[tuple[Path, WardroundError]]]:
    """Every input that can be is reconstructed, as `reconstruct` does; then those that cannot, and why.

    Which release it was is written beside them: `model.json` in a folder, NAME.model.json beside one file NAME.nii.gz;
    and by output how the network was adapted to its scan, where that was asked for.
    Raises the error of a single input.
    """
    single = isinstance(inputs, str | os.PathLike)
    sources = paths_of(inputs)
    whole = single and Path(out).name.endswith((".nii", ".nii.gz"))
    outputs = [Path(out)] if whole else [Path(out) / name for name in output_names(sources)]
    done, failed = [], []
    for source, output in zip(sources, outputs, strict=True):
        try:
            found = reconstructor(source, output)
        except WardroundError as error:
            if len(sources) == 1:
                raise
            failed.append((source, error))
            continue
        told(found)
        done.append(found)
    if done:
        beside = Path(out).with_name(f"{_base(Path(out).name)}.{USED}") if whole else Path(out) / USED
        fits = {found.output.name: found.fit.to_json() for found in done if found.fit is not None}
        reconstructor.release.write(beside, {"adapted_to_scan": fits} if fits else {})
    return done, failed


def paths_of(inputs: PathLike | Sequence[PathLike]) -> list[Path]:
    """One input or several as a list of paths."""
    return [Path(inputs)] if isinstance(inputs, str | os.PathLike) else [Path(each) for each in inputs]


def output_names(sources: Sequence[Path]) -> list[str]:
    """A file name for each input: its own, with as many of its folders before it as make all names differ.

    Raises `StudyError` where an input is given twice.
    """
    whole = [source.resolve() for source in sources]
    doubled = [str(path) for path, count in Counter(whole).items() if count > 1]
    if doubled:
        raise StudyError("an input is given twice; give each once", detail=", ".join(doubled))
    for depth in range(1, max((len(path.parts) for path in whole), default=1) + 1):
        names = ["_".join(part.strip("/") for part in path.parts[-depth:]) for path in whole]
        bases = [_base(name) for name in names]
        if len({base.casefold() for base in bases}) == len(bases):
            return [f"{base}.nii.gz" for base in bases]
    named = [str(path.with_name(_base(path.name))).casefold() for path in whole]
    alike = ", ".join(str(path) for path, name in zip(whole, named, strict=True) if named.count(name) > 1)
    raise StudyError("inputs differ in their endings alone; reconstruct them into folders of their own", detail=alike)


def _base(name: str) -> str:
    ending = next((ending for ending in _ENDINGS if name.endswith(ending)), "")
    return name.removesuffix(ending) if ending else name
