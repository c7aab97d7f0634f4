"""Compiled programs that are kept for the next run."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from pathlib import Path
from typing import Any

from .. import interrupts


_PARTIAL = ".partial-"
# A program is written in a moment: what is as old as this was left behind by a process that was killed.
_LEFT_BEHIND = 3600.0


def keep_programs(folder: Path):
    """Makes JAX keep what it compiles in a folder, and read it there."""
    import jax

    # It only saves time: where it cannot be made, programs are compiled each time.
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        for partial in folder.glob(f"{_PARTIAL}*"):
            if time.time() - partial.stat().st_mtime > _LEFT_BEHIND:
                partial.unlink()
        _write_whole_programs()
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _write_whole_programs():
    """Gives a program its name only when it is complete.

    JAX writes it under its name. A process that ends meanwhile leaves a part of it there, which is never replaced, and
    of which each run complains.
    """
    from jax._src.lru_cache import LRUCache

    put_in_place = LRUCache.put

    def put(self: Any, key: str, value: bytes):
        if self.eviction_enabled:
            return put_in_place(self, key, value)
        folder = Path(str(self.path))
        program, partial = folder / f"{key}-cache", folder / f"{_PARTIAL}{uuid.uuid4().hex}"
        with contextlib.suppress(OSError), interrupts.held():
            try:
                if not program.exists():
                    partial.write_bytes(value)
                    os.replace(partial, program)
            finally:
                partial.unlink(missing_ok=True)
        return None

    LRUCache.put = put
