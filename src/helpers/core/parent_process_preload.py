"""Imported first by a child process, so that it ends with its parent.

The server that measuring processes are forked off (`helpers.core.processes`) is started
by Python, which offers no other moment to tell it so.
"""

import os

from helpers.core.processes import die_with_parent

PARENT = "STUDY_MEASURING_PARENT"

if (parent := os.environ.pop(PARENT, None)) is not None:
    die_with_parent(int(parent))
