"""Notebooks as `make lab` opens them, so that looking at one is no change to it.

JupyterLab writes what a kernel says of itself (`kernelspec`, `language_info`) into a notebook as
soon as the kernel has started, and marks the notebook as changed if that differs from the file.
The notebooks hold all of it but the version of Python, which differs from machine to machine: it
is added when a notebook is read and left out when it is saved.
"""

import sys

from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager

LANGUAGE, VERSION = "language_info", "version"


class LabNotebooks(AsyncLargeFileManager):
    """Jupyter's files, with the version of Python in notebooks only while they are open."""

    async def get(self, path, content=True, *args, **options):
        """The file; a notebook of Python names the version that the kernel will report."""
        model = await super().get(path, content, *args, **options)
        language = _language(model)
        if language.get("name") == "python":
            language[VERSION] = sys.version.split()[0]  # as ipykernel says it
        return model

    async def save(self, model, path=""):
        """Write the file; a notebook is saved without the version of Python."""
        _language(model).pop(VERSION, None)
        return await super().save(model, path)


def _language(model: dict) -> dict:
    """A notebook's own entry on its language, to be changed; {} where there is none."""
    if model.get("type") != "notebook" or not model.get("content"):
        return {}
    return model["content"]["metadata"].get(LANGUAGE, {})
