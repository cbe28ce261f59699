"""Memory in huge pages, for programs that compute on CPU."""

import os
import sys

TUNABLE = "glibc.malloc.hugetlb"


def use_huge_pages() -> None:
    """Starts this program anew, with glibc asking Linux for huge pages. For scripts, before they do anything.

    XLA on CPU takes its memory anew for every step, and Linux clears it page by page: with pages of 4 KiB a training may spend
    a quarter of its processor time in that. Nothing happens on other systems, or if GLIBC_TUNABLES already says
    something of huge pages (glibc.malloc.hugetlb=0 keeps small ones).
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform != "linux" or TUNABLE in tunables:
        return
    os.environ["GLIBC_TUNABLES"] = f"{tunables}:{TUNABLE}=1".lstrip(":")
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
