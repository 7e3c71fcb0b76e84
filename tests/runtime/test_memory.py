"""Collections of garbage: what is passed over, and what is collected all the same."""

import subprocess
import sys

PROGRAM = """
import gc, weakref
from helpers.runtime.devices import exclude_imports_from_gc

class Model:
    def __init__(self):
        self.itself = self

assert not gc.get_freeze_count()
exclude_imports_from_gc()
passed_over = gc.get_freeze_count()
assert passed_over > 1000
model = Model()
seen = weakref.ref(model)
del model
exclude_imports_from_gc()
assert gc.get_freeze_count() <= passed_over
gc.collect()
assert seen() is None
"""


def test_libraries_are_passed_over_once_and_models_are_not():
    subprocess.run([sys.executable, "-c", PROGRAM], check=True)
