"""Files beside a study that become part of it as it is read: its hashes cover what they say, and not where they lie."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationInfo

from wardround.study.registry import STRICT, Reading
from wardround.study.start import below
from wardround.study.yaml_text import MAX_BYTES
from wardround.wire.files import reason


def first_beside(key: str, folder: str, names: tuple[str, ...], info: ValidationInfo) -> tuple[str, str]:
    """Name and text of the first of the files `names` in a folder below the study's; `key` is what names the folder.

    Raises ValueError where none is there or can be read, and for a study that is no file: one that came with a model
    reads nothing of the machine that it came to.
    """
    near = (info.context if isinstance(info.context, Reading) else STRICT).near
    below(folder)
    if near is None:
        raise ValueError(
            f"{key}: {folder} lies beside a study's file, and this study is none; give what it says instead"
        )
    place = near / folder
    name = next((name for name in names if (place / name).is_file()), None)
    if name is None:
        raise ValueError(f"{key}: {folder} has no {' or '.join(names)}; put it there, below the study's folder")
    return name, _text(f"{key}: {folder}/{name}", place / name)


def _text(said: str, path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ValueError(f"{said} has more than {MAX_BYTES:,} bytes, and no such file needs them")
        return data.decode()
    except OSError as error:
        raise ValueError(f"{said} cannot be read ({reason(error)})") from None
    except UnicodeDecodeError:
        raise ValueError(f"{said} is no text; get it again") from None
