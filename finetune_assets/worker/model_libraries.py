"""Imports transformers and peft without the packages that they load and a training does not use.

Importing both takes four times as long as importing torch. Half of that is bitsandbytes, scipy, boto3 and PyTorch's
compiler, which they load wherever they are installed, for layers, losses and decorators that are not used here, and
Python's search for garbage, of which imports make little. `lean_imports` puts these off:

- *bitsandbytes* counts as not installed until `use_bitsandbytes` is called, before a quantized model is loaded.
- *scipy.optimize*, *boto3* and *torch._dynamo* are loaded when something of theirs is called. Until then a stand-in
  module has their place in `sys.modules`; it loads the real one for any name that it does not know.

Afterwards importing any of these gives the real one, but for torch._dynamo: its stand-in stays until compiling, or a
part of PyTorch that needs more of it, loads the real one. Else building a model and an optimizer would, to tell it
what not to compile.
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
"""Functions that a decorator of torch._dynamo was put on before it was loaded, by the decorator's name."""


@contextmanager
def lean_imports() -> Iterator[None]:
    """Import transformers, peft, and modules that import them, without what they load and a training does not use."""
    there: dict[str, ModuleType | None] = {
        name: _StandIn(name, names) for name, names in PUT_OFF.items() if name not in sys.modules
    }
    if BITSANDBYTES not in sys.modules:
        there[BITSANDBYTES] = None  # what `find_spec` and `import` take for "not installed"
    if DYNAMO in there:
        sys.meta_path.insert(0, _Finder())
    sys.modules.update(there)  # type: ignore[arg-type]
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
        for name, module in there.items():
            if name != DYNAMO and sys.modules.get(name, there) is module:
                del sys.modules[name]
        if BITSANDBYTES in there:
            _keep_from_bitsandbytes()


def import_lean(module: str) -> Any:
    """Import one module, as in `lean_imports`."""
    with lean_imports():
        return importlib.import_module(module)


def use_bitsandbytes() -> None:
    """Have transformers and peft find bitsandbytes. To be called before a model is quantized with it."""
    import bitsandbytes
    import peft.helpers
    import peft.import_utils
    import transformers.utils.import_utils

    peft.import_utils.is_bnb_available.cache_clear()
    peft.import_utils.is_bnb_4bit_available.cache_clear()
    transformers.utils.import_utils.is_bitsandbytes_available.cache_clear()
    peft.helpers.bnb = bitsandbytes


def _keep_from_bitsandbytes() -> None:
    """Have peft remember that there is no bitsandbytes: it asks when it puts an adapter on a model, which loads it."""
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
    """Has the place of a module that is not loaded yet, and loads it for any name but those that it was given."""

    def __init__(self, name: str, names: dict[str, Any]) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None, is_package=True)  # `find_spec` asks for it
        self.__path__: list[str] = []  # and `import` of a submodule for this; the finder below is asked then
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
    """As torch._dynamo's: once that is loaded, by it; before that nothing is compiled."""
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
PUT_OFF: dict[str, dict[str, Any]] = {
    "boto3": {},  # accelerate's questions about SageMaker
    OBJECT_DETECTION: _first_call_loads(OBJECT_DETECTION, "linear_sum_assignment"),  # losses of transformers
    MASKS: _first_call_loads(MASKS, "TransformGetItemToIndex"),
    DYNAMO: {
        "assume_constant_result": partial(_mark, "assume_constant_result"),
        "allow_in_graph": partial(_mark, "allow_in_graph"),
        "disable": _disable,
        "graph_break": lambda *_, **__: None,
    },
}
"""Modules that are put off, and the names of theirs that transformers and accelerate take when they are imported."""


class _Finder(MetaPathFinder):
    """Loads the real module where a submodule of it is imported, and has a compiler that is loaded apply its marks."""

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
    """Gives a module that is loaded already."""

    def __init__(self, module: ModuleType) -> None:
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec
