"""Registers our networks with timm whether timm is imported before or after involution, or never.

Importing timm takes longer than importing torch does, so involution does not import it; it waits for the user to.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

ENTRY = "involution.models.timm_models"


class _AfterTimm(importlib.abc.MetaPathFinder):
    """Finds timm as the other finders do, and imports ENTRY once timm has run."""

    searching = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "timm" or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                sys.meta_path.remove(self)
                _register()

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    try:
        importlib.import_module(ENTRY)
    except ImportError as error:  # a timm too old or too new must not make "import timm" fail
        warnings.warn(f"our models are not registered with this timm: {error}", stacklevel=2)


def register_with_timm() -> None:
    """Register now if timm is imported, else when it is."""
    if "timm" in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _AfterTimm())
