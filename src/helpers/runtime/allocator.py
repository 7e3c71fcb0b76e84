"""What the C library (glibc) does with memory that Python let go of, too much or too little.

Freed tensors of a few megabytes lie between small ones that last, and such pages are kept:
1.9 GiB after one quantization of 0.6 B weights, held by the process and by no one in it.
And what lies freed at the end is returned at once and taken back page by page for the next
layer, over and over: a tenth of the time of an int8 evaluation (NOTES.md).
"""

import ctypes
import gc

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # as malloc.h numbers them
SPARE_BYTES = 2**27  # kept for later allocations
LARGE_BYTES = 2**25  # larger blocks are mapped separately and returned at once


def release_memory() -> None:
    """Collect garbage and return freed pages to the system."""
    gc.collect()
    trim_heap()


def trim_heap() -> None:
    """Return freed pages to the system if the C library can (glibc); else do nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def set_malloc_thresholds() -> None:
    """Make malloc keep SPARE_BYTES of freed memory and map large blocks separately (glibc)."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(M_MMAP_THRESHOLD, LARGE_BYTES)
        set_option(M_TRIM_THRESHOLD, SPARE_BYTES)


def exclude_imports_from_gc() -> None:
    """Exclude the objects that exist now, mostly of libraries, from garbage collection.

    Only the first call in a process does so, since models are freed later. A collection took a
    third of a second before.
    """
    if not gc.get_freeze_count():
        gc.freeze()
