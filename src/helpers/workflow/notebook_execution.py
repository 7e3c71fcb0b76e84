"""Executes one notebook as one job, on this very interpreter, whatever kernels are installed.

papermill runs it under a temporary name that becomes the final one only on success; of a
failure the notebook is kept beside it. A job ends when the process that started it ends,
however that ended, and its kernel with it.
"""

import logging
import os
import sys
from pathlib import Path

from helpers.core.errors import StudyError, remedy_for
from helpers.core.file_writing import write_atomically
from helpers.core.parent_process import die_with_parent
from helpers.core.paths import PROJECT, relative_to_project
from helpers.core.plain_text import safe_message
from helpers.workflow.notebook_cleaning import cleaned_text

JOB_ENVIRONMENT = {
    "PYTHONHASHSEED": "0",
    "PYTHONUTF8": "1",  # whatever the locale is
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # silences the debugger's start-up warning
    "TOKENIZERS_PARALLELISM": "false",
}
START_ATTEMPTS = 3  # kernels starting at the same moment can pick the same port


class JobFailed(Exception):
    """A job's notebook failed; the message is for the terminal."""

    def __init__(self, text: str):
        super().__init__(safe_message(text))


def kernel(arguments: list[str]) -> None:
    """Become a Jupyter kernel that ends with the runner that started it."""
    die_with_parent(int(os.environ["JPY_PARENT_PID"]))
    sys.path.pop(0)  # `-m` put the working directory there
    from ipykernel.kernelapp import launch_new_instance

    quiet = ["--HistoryManager.enabled=False", "--IPKernelApp.log_level=CRITICAL"]
    launch_new_instance(argv=[*arguments, *quiet])


def _kernel_manager_class():
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    class ThisInterpreter(AsyncKernelManager):
        """Starts the job's own interpreter instead of an installed kernel."""

        @property
        def kernel_spec(self) -> KernelSpec:
            start = [sys.executable, "-m", "helpers.workflow.cli", "kernel"]
            argv = [*start, "-f", "{connection_file}"]
            return KernelSpec(argv=argv, display_name="Python 3 (ipykernel)", language="python")

    return ThisInterpreter


def run_notebook(notebook: Path, output: Path, parameters: dict[str, str]) -> None:
    """Execute `notebook` with the parameters into `output`.

    Raises:
        JobFailed: a cell failed. `<output>.failed.ipynb` shows which; `output` does not exist.
    """
    running = output.with_name(f"{output.stem}.running.ipynb")
    failed = output.with_name(f"{output.stem}.failed.ipynb")
    os.environ.update(JOB_ENVIRONMENT)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        for old in (output, running):
            old.unlink(missing_ok=True)
        _execute(notebook, running, parameters)
        _publish(running, output)
        failed.unlink(missing_ok=True)
    except Exception as error:
        raise JobFailed(_reason(error) + _keep_failed(running, failed)) from error
    finally:
        running.unlink(missing_ok=True)


def _execute(notebook: Path, running: Path, parameters: dict[str, str]) -> None:
    import papermill

    for name in ("asyncio", "traitlets"):  # the job reports their errors itself
        logging.getLogger(name).setLevel(logging.CRITICAL)
    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            papermill.execute_notebook(
                notebook,
                running,
                parameters=parameters,
                cwd=PROJECT,
                kernel_name="python3",
                language="python",
                progress_bar=False,
                kernel_manager_class=_kernel_manager_class(),
                shutdown_kernel="immediate",  # all is written; a graceful end takes seconds
            )
            return
        except RuntimeError as error:
            never_ran = "before replying to kernel_info" in str(error)
            if not never_ran or attempt == START_ATTEMPTS:
                raise


def _publish(running: Path, final: Path) -> None:
    text = cleaned_text(running)
    write_atomically(final, lambda path: path.write_text(text, encoding="utf-8"))


def _keep_failed(running: Path, failed: Path) -> str:
    """Keep the failed notebook if possible; returns a line that names it, or an empty text."""
    try:
        _publish(running, failed)
    except (OSError, ValueError):  # papermill wrote none, or the disk is full
        return ""
    return f"\nsee {relative_to_project(failed)}"


def _reason(error: Exception) -> str:
    """The error in one line; a StudyError without the exception's name."""
    from nbclient.exceptions import DeadKernelError

    if isinstance(error, DeadKernelError):
        return "the kernel died; most often the machine ran out of memory"
    name = getattr(error, "ename", type(error).__name__)
    value = str(getattr(error, "evalue", error)).strip()
    if name == StudyError.__name__:
        return value
    reason = f"{name}: {value.splitlines()[-1] if value else 'no message'}"
    return "; ".join(filter(None, (reason, remedy_for(f"{name} {value}"))))
