"""Import transformers and peft without the packages that they load and training does not use.

Importing both takes four times as long as importing torch. Half of that time is spent on garbage collection, although
imports produce little garbage, and on bitsandbytes, scipy, boto3 and PyTorch's compiler. transformers and peft load
these packages wherever they are installed, for layers, losses and decorators that are not used here. `lean_imports`
defers them:

- *bitsandbytes* counts as not installed until `use_bitsandbytes` is called, before a quantized model is loaded.
- *scipy.optimize*, *boto3* and *torch._dynamo* are loaded when one of their functions is called. Until then, a stand-in
  module replaces them in `sys.modules`. It loads the real module for any name that it does not define.

After `lean_imports`, importing any of these returns the real module, with the exception of torch._dynamo. Its stand-in
stays until compilation, or a part of PyTorch that needs more of it, loads the real one. Otherwise building a model and
an optimizer would load it, to mark functions that must not be compiled.
"""

import gc
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

BITSANDBYTES = "bitsandbytes"
DYNAMO = "torch._dynamo"
_marked: list[tuple[str, Callable[..., Any]]] = []
"""Functions decorated by torch._dynamo before it was loaded, as pairs of decorator name and function."""


@contextmanager
def lean_imports() -> Iterator[None]:
    """Import transformers, peft and modules that import them, without the packages that training does not use."""
    stand_ins: dict[str, ModuleType | None] = {
        name: _StandIn(name, names) for name, names in DEFERRED.items() if name not in sys.modules
    }
    if BITSANDBYTES not in sys.modules:
        stand_ins[BITSANDBYTES] = None  # `find_spec` and `import` treat None as "not installed"
    if DYNAMO in stand_ins:
        sys.meta_path.insert(0, _Finder())
    sys.modules.update(stand_ins)  # type: ignore[arg-type]
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
        for name, module in stand_ins.items():
            if name != DYNAMO and sys.modules.get(name, stand_ins) is module:
                del sys.modules[name]
        if BITSANDBYTES in stand_ins:
            _hide_bitsandbytes()


def import_lean(module: str) -> Any:
    """Import one module within `lean_imports`."""
    with lean_imports():
        return importlib.import_module(module)


def use_bitsandbytes() -> None:
    """Make bitsandbytes available to transformers and peft. Call this before quantizing a model with it."""
    import bitsandbytes
    import peft.helpers
    import peft.import_utils
    import transformers.utils.import_utils

    peft.import_utils.is_bnb_available.cache_clear()
    peft.import_utils.is_bnb_4bit_available.cache_clear()
    transformers.utils.import_utils.is_bitsandbytes_available.cache_clear()
    peft.helpers.bnb = bitsandbytes


def _hide_bitsandbytes() -> None:
    """Make peft cache that bitsandbytes is absent. Otherwise peft loads it when it adds an adapter to a model."""
    peft = sys.modules.get("peft.import_utils")
    if peft:
        with _absent(BITSANDBYTES):
            peft.is_bnb_available()
            peft.is_bnb_4bit_available()


@contextmanager
def _absent(name: str) -> Iterator[None]:
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]


# ---- stand-ins


class _StandIn(ModuleType):
    """Stand-in for a module that is not loaded yet. Loads the module for any name outside `names`."""

    def __init__(self, name: str, names: dict[str, Any]) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None, is_package=True)  # required by `find_spec`
        self.__path__: list[str] = []  # required to import a submodule, which `_Finder` below then resolves
        vars(self).update(names)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.real(), name)

    def real(self) -> ModuleType:
        """Load the module."""
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return importlib.import_module(self.__name__)


def _first_call_loads(module: str, name: str) -> dict[str, Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args, **kwargs)

    return {name: call}


def _mark(decorator: str, function: Callable[..., Any]) -> Callable[..., Any]:
    _marked.append((decorator, function))
    return function


def _disable(function: Any = None, recursive: bool = True, **options: Any) -> Any:
    """Equivalent of `torch._dynamo.disable`: calls it once it is loaded; before that, nothing is compiled."""
    if function is None:
        return partial(_disable, recursive=recursive, **options)
    by_compiler: list[Callable[..., Any]] = []

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if isinstance(compiler := sys.modules.get(DYNAMO), _StandIn | None):
            return function(*args, **kwargs)
        if not by_compiler:
            by_compiler.append(compiler.disable(function, recursive, **options))
        return by_compiler[0](*args, **kwargs)

    return call


OBJECT_DETECTION, MASKS = "scipy.optimize", f"{DYNAMO}._trace_wrapped_higher_order_op"
DEFERRED: dict[str, dict[str, Any]] = {
    "boto3": {},  # imported by accelerate to detect SageMaker
    OBJECT_DETECTION: _first_call_loads(OBJECT_DETECTION, "linear_sum_assignment"),  # losses of transformers
    MASKS: _first_call_loads(MASKS, "TransformGetItemToIndex"),
    DYNAMO: {
        "assume_constant_result": partial(_mark, "assume_constant_result"),
        "allow_in_graph": partial(_mark, "allow_in_graph"),
        "disable": _disable,
        "graph_break": lambda *_, **__: None,
    },
}
"""Deferred modules, and the names that transformers and accelerate import from them at import time."""


class _Finder(MetaPathFinder):
    """Loads the real module when a submodule of it is imported, and applies deferred decorators to torch._dynamo."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        parent = sys.modules.get(name.rpartition(".")[0])
        if isinstance(parent, _StandIn):
            parent.real()
            return ModuleSpec(name, _Loaded(importlib.import_module(name)))
        return self._marking() if name == DYNAMO else None

    def _marking(self) -> ModuleSpec | None:
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(DYNAMO)
        if spec and spec.loader:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                while _marked:
                    decorator, function = _marked.pop(0)
                    getattr(module, decorator)(function)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


class _Loaded(Loader):
    """Returns a module that is already loaded."""

    def __init__(self, module: ModuleType) -> None:
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec
