"""What the notebooks call: one package for each kind of work, one field concept a module.

Nobody is told of a run: the Hub's client, which asks when it is first imported, is
answered here.
"""

import os

os.environ["HF_HUB_DISABLE_TELEMETRY"] = os.environ["DO_NOT_TRACK"] = "1"
