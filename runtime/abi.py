# SPDX-License-Identifier: Apache-2.0
"""The few things of the package ``tvm_ffi`` that running an artifact takes, under the same names, over tvm-ffi's C ABI.

Importing ``tvm_ffi`` takes 60 ms and 15 MiB, most of it for what only a compiler needs. This takes one. Structures are
those of ``tvm/ffi/c_api.h`` (version 0.1) and ``dlpack.h``; ``runtime/cpp/tvm.h`` is the same in C++. Calls let other
Python threads run.
"""

from __future__ import annotations

import ctypes
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

VERSION = (0, 1)
"""Of the ABI that is described here: major and minor."""

_NONE, _INT, _BOOL, _DATA_TYPE, _DEVICE, _RAW_TEXT = 0, 1, 2, 5, 6, 8
_FIRST_OBJECT, _FUNCTION, _TENSOR, _ARRAY, _MODULE = 64, 68, 70, 71, 73
_HEADER = 24  # bytes of TVMFFIObject; what an object holds follows
_CODES = {"int": 0, "uint": 1, "float": 2, "bfloat": 4, "bool": 6}  # DLDataTypeCode
_DEVICES = {"cpu": 1, "cuda": 2}


class _Any(ctypes.Structure):
    """``TVMFFIAny``; what its union holds is written as an integer."""

    _fields_ = (("type", ctypes.c_int32), ("padding", ctypes.c_uint32), ("value", ctypes.c_int64))


class _Bytes(ctypes.Structure):
    """``TVMFFIByteArray``."""

    _fields_ = (("data", ctypes.c_void_p), ("size", ctypes.c_size_t))


class _Array(ctypes.Structure):
    """The beginning of ``TVMFFISeqCell``."""

    _fields_ = (("data", ctypes.c_void_p), ("size", ctypes.c_int64))


class _DLTensor(ctypes.Structure):
    """``DLTensor``."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Library:
    """Functions of ``libtvm_ffi.so``, once `open_library` has been called."""

    call: Any = None
    release: Any = None
    own: Any = None
    find: Any = None
    raised: Any = None
    from_dlpack: Any = None
    set_stream: Any = None
    handle: Any = None


def open_library(path: pathlib.Path) -> bool:
    """Opens ``libtvm_ffi.so``; once a process.

    Returns:
        False if its ABI is not the one described here; nothing is used of it then.

    Raises:
        OSError: if it does not load.
    """
    library = ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    found = (ctypes.c_uint32 * 3)()
    library.TVMFFIGetVersion(found)
    if tuple(found)[:2] != VERSION:
        return False
    pointer, number, any_pointer = ctypes.c_void_p, ctypes.c_int32, ctypes.POINTER(_Any)
    signatures = {
        "call": ("TVMFFIFunctionCall", (pointer, any_pointer, number, any_pointer)),
        "release": ("TVMFFIObjectDecRef", (pointer,)),
        "own": ("TVMFFIAnyViewToOwnedAny", (pointer, any_pointer)),
        "find": ("TVMFFIFunctionGetGlobal", (ctypes.POINTER(_Bytes), ctypes.POINTER(pointer))),
        "from_dlpack": ("TVMFFITensorFromDLPack", (pointer, number, number, ctypes.POINTER(pointer))),
        "set_stream": ("TVMFFIEnvSetStream", (number, number, pointer, ctypes.POINTER(pointer))),
        "raised": ("TVMFFIErrorMoveFromRaised", (ctypes.POINTER(pointer),)),
    }
    for name, (symbol, arguments) in signatures.items():
        function = getattr(library, symbol)
        function.argtypes, function.restype = arguments, None if name == "raised" else ctypes.c_int
        setattr(_Library, name, function)
    _Library.handle = library
    return True


class device(NamedTuple):
    """``cpu`` or ``cuda`` and which of them."""

    kind: str
    number: int

    @property
    def type_code(self) -> int:
        """``DLDeviceType``."""
        return _DEVICES[self.kind]


class dtype(str):
    """A type of elements, such as ``float16``; a string with its size."""

    __slots__ = ()

    @property
    def bits(self) -> int:
        """Of an element."""
        return 8 if self == "bool" else int(self.lstrip("abcdefghijklmnopqrstuvwxyz"))

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.bits // 8

    @property
    def code(self) -> int:
        """``DLDataTypeCode``."""
        return _CODES[self.rstrip("0123456789")]


class Object:
    """A reference to an object of the runtime, given back when this goes."""

    __slots__ = ("handle",)

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def __del__(self, release: Any = _Library) -> None:
        # At the end of the process modules are emptied; whoever is left then is given back by the system.
        if release.release is not None:
            release.release(self.handle)


class Function(Object):
    """Something to call with numbers, text, None, devices, types and objects."""

    __slots__ = ()

    def __call__(self, *arguments: Any) -> Any:
        """Calls it.

        Raises:
            RuntimeError: with the words of the one who raised it.
            TypeError: for an argument of another kind.
        """
        views, kept = (_Any * len(arguments))(), []
        for view, argument in zip(views, arguments, strict=True):
            if isinstance(argument, Object):
                view.type = ctypes.c_int32.from_address(argument.handle + 8).value
                view.value = argument.handle
            elif isinstance(argument, dtype):
                view.type, view.value = _DATA_TYPE, argument.code | argument.bits << 8 | 1 << 16
            elif isinstance(argument, str):
                kept.append(ctypes.create_string_buffer(argument.encode()))
                view.type, view.value = _RAW_TEXT, ctypes.addressof(kept[-1])
            elif isinstance(argument, device):
                view.type, view.value = _DEVICE, argument.type_code | argument.number << 32
            elif isinstance(argument, bool):
                view.type, view.value = _BOOL, argument
            elif isinstance(argument, int):
                view.type, view.value = _INT, argument
            elif argument is not None:
                raise TypeError(f"TVM's functions are not called with a {type(argument).__name__} here.")
        result = _Any()
        _check(_Library.call(self.handle, views, len(arguments), result))
        return _taken(result)


class Tensor(Object):
    """A tensor of the runtime; its elements are not looked at here."""

    __slots__ = ()

    @property
    def _cell(self) -> _DLTensor:
        return _DLTensor.from_address(self.handle + _HEADER)

    @property
    def shape(self) -> tuple[int, ...]:
        """Its dimensions."""
        cell = self._cell
        return tuple(cell.shape[: cell.ndim])

    @property
    def dtype(self) -> dtype:
        """The type of its elements."""
        cell = self._cell
        kind = next(name for name, code in _CODES.items() if code == cell.code)
        return dtype(kind if kind == "bool" else f"{kind}{cell.bits}")

    def numel(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    def data_ptr(self) -> int:
        """Address of its first element."""
        cell = self._cell
        return int(cell.data or 0) + int(cell.byte_offset)


class Array(Object):
    """What functions take and return for tuples."""

    __slots__ = ()

    @property
    def _cell(self) -> _Array:
        return _Array.from_address(self.handle + _HEADER)

    def __len__(self) -> int:
        return int(self._cell.size)

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"There is no element {index} among {len(self)}.")
        element = _Any()
        _check(_Library.own(self._cell.data + index * ctypes.sizeof(_Any), element))
        return _taken(element)

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))


class Module(Object):
    """A loaded library, or what it makes; ``module[name]`` is a function of it."""

    __slots__ = ()

    def __getitem__(self, name: str) -> Function:
        found = get_global_func("ffi.ModuleGetFunction")(self, name, False)
        if not isinstance(found, Function):
            raise AttributeError(f"The module has no function {name!r}.")
        return found


_KINDS: dict[int, type[Object]] = {_FUNCTION: Function, _TENSOR: Tensor, _ARRAY: Array, _MODULE: Module}


def get_global_func(name: str, allow_missing: bool = False) -> Any:
    """A function of the runtime by its registered name; None if there is none and that is allowed.

    Raises:
        ValueError: if there is none.
    """
    text, found = name.encode(), ctypes.c_void_p()
    key = _Bytes(ctypes.cast(ctypes.c_char_p(text), ctypes.c_void_p), len(text))
    _check(_Library.find(key, found))
    if found.value:
        return Function(found.value)
    if allow_missing:
        return None
    raise ValueError(f"The TVM runtime has no function {name!r}.")


def load_module(path: str) -> Module:
    """Opens a compiled library; it stays open, since functions of it may be referred to anywhere."""
    module = get_global_func("ffi.ModuleLoadFromFile")(path)
    get_global_func("ffi.ModuleGlobalsAdd")(module)
    assert isinstance(module, Module)
    return module


def Shape(sizes: Sequence[int]) -> Any:
    """A shape as functions take it."""
    return get_global_func("ffi.Shape")(*sizes)


def convert(values: Sequence[Any]) -> Any:
    """An array of objects."""
    return get_global_func("ffi.Array")(*values)


def from_dlpack(array: np.ndarray) -> Tensor:
    """A tensor over an array's own memory, which stays as long as the tensor.

    Raises:
        ValueError: if the array is not contiguous.
    """
    if not array.flags.c_contiguous:
        raise ValueError("The array is not contiguous.")
    capsule, found = array.__dlpack__(), ctypes.c_void_p()
    _check(_Library.from_dlpack(_capsule_pointer(capsule, b"dltensor"), 0, 0, found))
    # Renamed, a capsule does not free what the tensor has taken over (Python's specification of DLPack).
    _rename_capsule(capsule, b"used_dltensor")
    return Tensor(int(found.value or 0))


class use_raw_stream:
    """Inside, this thread's calls enqueue on a stream of a device."""

    def __init__(self, where: device, stream: int) -> None:
        self._where, self._stream, self._before = where, stream, ctypes.c_void_p()

    def __enter__(self) -> None:
        where = self._where
        _check(_Library.set_stream(where.type_code, where.number, self._stream, self._before))

    def __exit__(self, *_: object) -> None:
        where = self._where
        _check(_Library.set_stream(where.type_code, where.number, self._before, ctypes.c_void_p()))


_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_rename_capsule = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_SetName", ctypes.pythonapi)
)


def _taken(result: _Any) -> Any:
    """The Python value of a result, whose reference is taken over."""
    if result.type == _NONE:
        return None
    if result.type in (_INT, _BOOL):
        return bool(result.value) if result.type == _BOOL else result.value
    if result.type < _FIRST_OBJECT:
        raise RuntimeError(f"TVM's runtime returned a value of type {result.type}, which artifacts do not use.")
    return _KINDS.get(result.type, Object)(result.value)


def _check(status: int) -> None:
    """Raises what the runtime raised in this thread."""
    if status == 0:
        return
    error = ctypes.c_void_p()
    _Library.raised(error)
    if not error.value:
        raise RuntimeError("TVM's runtime failed and gave no reason.")
    kept = Object(error.value)
    cell = (_Bytes * 2).from_address(kept.handle + _HEADER)  # TVMFFIErrorCell: kind, message
    raise RuntimeError(ctypes.string_at(cell[1].data, cell[1].size).decode("utf-8", "replace"))
