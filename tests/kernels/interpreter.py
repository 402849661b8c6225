"""Half the time in Triton's interpreter: it replaces the functions of triton.language at every call of a jitted helper, though the call of
the kernel around it has done so; here that happens once a kernel."""

from __future__ import annotations

from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def patch_once() -> None:
    """Until the process ends. Without effect on a Triton whose interpreter is built in another way."""
    if not (hasattr(interpreter, "_patch_lang") and hasattr(getattr(interpreter, "_LangPatchScope", None), "restore")):
        return
    patch, restore = interpreter._patch_lang, interpreter._LangPatchScope.restore
    patched: set[str] = set()

    def patch_lang(fn: Any) -> Any:
        modules = {module.__name__ for module in fn.__globals__.values() if module is tl or module is tl.core}
        if modules and modules <= patched:
            return interpreter._LangPatchScope()
        patched.update(modules)
        return patch(fn)

    def restore_all(scope: Any) -> None:
        patched.clear()
        restore(scope)

    interpreter._patch_lang, interpreter._LangPatchScope.restore = patch_lang, restore_all
