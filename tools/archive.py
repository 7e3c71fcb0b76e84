"""A study in one file, to be looked at again elsewhere: records, answers, report, no weights.

    python -m tools.archive pack demo
    python -m tools.archive again outputs/demo.tar.gz --to /some/folder

The same outputs make the same bytes. The first file inside is `manifest.json`, with the
content hash of every other one. Making the report again needs neither models nor data
nor torch: everything in it is computed from what is in the archive, and `summary.json`
has to come out as it went in.
"""

import argparse
import contextlib
import gzip
import io
import json
import os
import re
import shutil
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from helpers.core.errors import StudyError
from helpers.core.files import (
    PROJECT,
    StudyPaths,
    acquire_lock,
    outputs_root,
    release_lock,
    write_atomically,
)
from helpers.core.records import sha256_file
from helpers.study.loading import load_study, study_file
from helpers.study.schema import PATTERN

FORMAT = 1
MANIFEST = "manifest.json"
LARGEST_MANIFEST = 64 * 2**20
MOST_BYTES = 8 * 2**30  # unpacked
EXCLUDED_ENDINGS = (".failed.ipynb", ".running.ipynb", ".tmp")


def pack(study: str, to: Path | None = None) -> Path:
    """Write a study's archive and return its path, `outputs/<study>.tar.gz` if none is given.

    Raises:
        StudyError: there is no study file, or its results are incomplete.
    """
    load_study(study, with_sources=False)
    study_path = study_file(study)
    paths = StudyPaths(study_path.stem)
    paths.check_links()
    if not (paths.root / "summary.json").is_file():
        raise StudyError(f"{paths.study} has no results yet; run make study STUDY={paths.study}")
    with _study_lock(paths):
        files = {f"params/{paths.study}.yaml": study_path, **_results(paths)}
        hashes = {name: sha256_file(path) for name, path in files.items()}
        manifest = {"format": FORMAT, "study": paths.study, "files": hashes}
        target = to or outputs_root() / f"{paths.study}.tar.gz"
        write_atomically(target, lambda path: _write(path, manifest, files))
    return target


@contextlib.contextmanager
def _study_lock(paths: StudyPaths) -> Iterator[None]:
    """Inside the context, hold the lock that a run of the study holds."""
    lock = outputs_root() / f".{paths.study}.lock"
    acquire_lock(lock, f"study {paths.study!r} is being run")
    try:
        yield
    finally:
        release_lock(lock)


def _results(paths: StudyPaths) -> dict[str, Path]:
    """Every file of a study's results by its name in the archive, without weights."""
    files = {}
    for path in sorted(p for p in paths.root.rglob("*") if p.is_file()):
        relative = path.relative_to(paths.root)
        hidden = any(part.startswith(".") for part in relative.parts)
        is_weight = relative.parts[1:2] == ("model",) or relative.parts[2:3] == ("checkpoint",)
        if path.suffix == ".safetensors":  # the calibrations of all draws are kept
            is_weight |= re.split("[~+]", relative.parts[1])[0] != "calibration"
        if hidden or path.name.endswith(EXCLUDED_ENDINGS):
            continue
        if is_weight and path.name != "record.json":
            continue
        files[f"outputs/{paths.study}/{relative.as_posix()}"] = path
    return files


def _write(target: Path, about: dict, files: dict[str, Path]) -> None:
    """Write the archive; equal files give equal bytes: sorted, without owners and times."""
    manifest = json.dumps(about, indent=1, sort_keys=True).encode("utf-8")
    with (
        open(target, "wb") as raw,
        gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        archive.addfile(_member(MANIFEST, len(manifest)), io.BytesIO(manifest))
        for name, path in sorted(files.items()):
            with open(path, "rb") as content:
                archive.addfile(_member(name, path.stat().st_size), content)


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    return member


def unpack(archive: Path, to: Path) -> dict:
    """Unpack an archive into a new folder, check every hash, and return the manifest.

    tar alone checks no content and admits paths outside the folder.

    Raises:
        StudyError: the folder is not empty, or the archive is damaged, holds a file that its
            manifest does not list, or one outside the folder. The folder is then empty.
    """
    if to.exists() and any(to.iterdir()):
        raise StudyError(f"{to} is not empty; give a new folder")
    to.mkdir(parents=True, exist_ok=True)
    try:
        return _unpack_all(archive, to)
    except StudyError:
        for path in to.iterdir():  # the folder was empty
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise


def _unpack_all(archive: Path, to: Path) -> dict:
    try:
        with tarfile.open(archive, "r:gz") as opened:
            manifest = _manifest(opened, archive)
            remaining = dict(manifest["files"])
            total_bytes = 0
            while member := opened.next():
                total_bytes += member.size  # of a sparse member the unpacked size
                if total_bytes > MOST_BYTES:
                    raise StudyError(f"{archive}: unpacks to more than {MOST_BYTES:,} bytes")
                _unpack_one(opened, member, remaining, to, archive)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise StudyError(f"{archive}: is no complete archive of a study ({error})") from None
    if remaining:
        raise StudyError(f"{archive}: lacks {min(remaining)}; pack the study again")
    return manifest


def _manifest(opened: tarfile.TarFile, archive: Path) -> dict:
    first = opened.next()
    try:
        if first.name != MANIFEST or not first.isreg() or first.size > LARGEST_MANIFEST:
            raise ValueError(first.name)
        manifest = json.loads(opened.extractfile(first).read())
        names = [PurePosixPath(name) for name in manifest["files"]]
        is_inside = all(n.parts[0] in ("params", "outputs") and ".." not in n.parts for n in names)
        if (
            manifest["format"] != FORMAT
            or not is_inside
            or not re.fullmatch(PATTERN, manifest["study"])
        ):
            raise ValueError("format")
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RecursionError):
        raise StudyError(f"{archive}: is no archive of a study; make archive makes one") from None
    return manifest


def _unpack_one(opened, member: tarfile.TarInfo, remaining: dict, to: Path, archive: Path) -> None:
    digest = remaining.pop(member.name, None)
    if digest is None or not member.isreg():
        raise StudyError(f"{archive}: holds {member.name!r}, which its manifest does not list")
    target = to / member.name
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "wb") as stream:
        content = opened.extractfile(member)
        while block := content.read(2**20):
            stream.write(block)
    if sha256_file(target) != digest:
        raise StudyError(
            f"{archive}: {member.name} differs from its checksum; pack the study again"
        )


def remake_report(archive: Path, to: Path) -> Path:
    """Unpack a study and recompute its report; return the report's folder.

    Raises:
        StudyError: the archive is damaged, or the recomputed `summary.json` differs.
        JobFailed: the analysis rejects the results.
    """
    from helpers.workflow.cli import export_report, run_notebook

    manifest = unpack(archive, to)
    name = manifest["study"]
    os.environ["STUDY_OUTPUTS"] = str(to.resolve() / "outputs")
    study, paths = str(to.resolve() / "params" / f"{name}.yaml"), StudyPaths(name)
    executed = paths.notebooks / "04_analysis.ipynb"
    run_notebook(PROJECT / "notebooks" / "04_analysis.ipynb", executed, {"study": study})
    export_report(executed, study, paths.root)
    for file in ("summary.json", "summary.csv"):
        packed_hash = manifest["files"].get(f"outputs/{name}/{file}")
        if sha256_file(paths.root / file) != packed_hash:
            raise StudyError(
                f"{paths.root / file} differs from the archive's: this version of the project "
                "computes another one from the same results"
            )
    return paths.root


def main(argv: list[str] | None = None) -> int:
    """The command line; see `--help`."""
    from helpers.workflow.cli import JobFailed

    parser = argparse.ArgumentParser(prog="python -m tools.archive", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="write a study's results into one file")
    packing.add_argument("study")
    packing.add_argument("--to", type=Path)
    again = commands.add_parser("again", help="recompute the report from such a file")
    again.add_argument("archive", type=Path)
    again.add_argument("--to", type=Path, required=True, help="a new folder")
    args = parser.parse_args(argv)
    try:
        if args.command == "pack":
            archive_path = pack(args.study, args.to)
            print(f"{archive_path}: {archive_path.stat().st_size / 1e6:.1f} MB")
        else:
            folder = remake_report(args.archive, args.to)
            print(f"the same summary.json and summary.csv; the report is {folder / 'report.html'}")
    except (StudyError, JobFailed) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
