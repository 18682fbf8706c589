"""A machine that runs the opcodes of a pickle on plain data, within the budget of its file.

A pickle is a program that calls whatever it names; here it reaches only what `pickle_names` allows.
Every object is charged for what it costs to create, to keep and to hash, so that memory and time
stay in proportion to the size of the file.
"""

from __future__ import annotations

import io
import pickletools
import sys
from collections import OrderedDict
from collections.abc import Callable
from types import FunctionType
from typing import Any, BinaryIO

from tangent_arithmetic.runtime.errors import UsageError, shown
from tangent_arithmetic.storage.pickle_names import (
    ARGUMENTS,
    OBJECT,
    TENSOR,
    Budget,
    Names,
    Refused,
    Stub,
    StubClass,
    allows_stub,
    build_frozenset,
    quoted,
)

MEMO = 130  # bytes charged for a memo entry


class Machine:
    """Runs one pickle; each opcode is charged before it creates anything, or as it does.

    Args:
        known: the functions and dtypes that the pickle may name.
        storage: a function from a persistent id to its storage.
        budget: the file's budget.
    """

    def __init__(self, known: Names, storage: Callable[[Any], Any], budget: Budget) -> None:
        self._known, self._storage, self._budget = known, storage, budget
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._stubs: dict[tuple[str, str], StubClass] = {}

    def run(self, stream: BinaryIO) -> Any:
        """Runs the pickle and returns its object.

        Raises:
            Refused: for an opcode that is not allowed, or that costs too much.
        """
        for opcode, arg, position in pickletools.genops(stream):
            self._budget.work()
            if opcode.name in LITERALS:
                self._push_sized(arg)
            elif opcode.name in ACTIONS:
                ACTIONS[opcode.name](self, arg)
            else:
                raise Refused(f"it has the opcode {opcode.name} at byte {position}")
        return self._stack.pop()

    def _push(self, value: Any, cost: int = 0) -> None:
        self._budget.keep(cost + 16)  # and its stack slot
        self._stack.append(value)

    def _push_sized(self, value: Any) -> None:
        self._push(value, sys.getsizeof(value))

    def _pop_marked(self) -> list[Any]:
        """Pops everything above the last mark."""
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _pop_many(self, count: int) -> list[Any]:
        """Pops `count` objects, the deepest first."""
        if count > len(self._stack):
            raise Refused("it pops from an empty stack")
        return [self._stack.pop() for _ in range(count)][::-1]

    def _mark(self, arg: Any) -> None:
        self._budget.keep(40)
        self._marks.append(len(self._stack))

    def _pop(self, arg: Any) -> None:
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._stack.pop()

    def _put(self, arg: int | None) -> None:
        self._budget.keep(MEMO)
        index = len(self._memo) if arg is None else arg
        if index > 4 * len(self._memo) + 4096:
            raise Refused(f"it writes memo entry {index} of {len(self._memo)}")
        self._memo[index] = self._stack[-1]

    def _text(self, arg: str) -> None:
        """A string of Python 2, which may be any bytes."""
        self._push_sized(arg.encode("latin1").decode("utf-8", errors="replace"))

    def _persistent(self, arg: Any) -> None:
        self._budget.keep(TENSOR)
        self._push(self._storage(self._stack.pop()))

    def _dict(self, arg: Any) -> None:
        items = self._pop_marked()
        self._push({}, OBJECT)
        self._set(items)

    def _append(self, items: list[Any]) -> None:
        self._budget.keep(24 * len(items))
        target = self._top(list, "appends to")
        target += items

    def _set(self, items: list[Any]) -> None:
        target = self._top(dict, "sets an item of")
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._budget.key(key, len(target))
            self._budget.name(value)
            target[key] = value

    def _add(self, arg: Any) -> None:
        items = self._pop_marked()
        target = self._top(set, "adds to")
        for item in items:
            self._budget.key(item, len(target))
            target.add(item)

    def _top(self, kind: type, action: str) -> Any:
        target = self._stack[-1]
        if not isinstance(target, kind):
            raise Refused(f"it {action} a {type(target).__name__}")
        return target

    def _resolve(self, module: Any, name: Any) -> None:
        """Pushes the function, dtype or stub class that stands for a name."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise Refused(f"it names {quoted(module)}, {quoted(name)}")
        key = (module, name)
        value = self._known.get(key) or self._stubs.get(key)
        if value is None:
            if not allows_stub(module, name):
                raise Refused(f"it names {shown(f'{module}.{name}')}")
            self._budget.keep(2 * OBJECT + 2 * (len(module) + len(name)))
            value = self._stubs[key] = StubClass(f"{module}.{name}")
        self._push(value)

    def _reduce(self, arg: Any) -> None:
        of, args = self._pop_many(2)
        if not isinstance(args, tuple):
            raise Refused(f"it calls something with a {type(args).__name__}")
        if isinstance(of, FunctionType):  # only those of `known` can be on the stack
            self._push(of(self._budget, *args))
        else:
            stub = self._stub(of)
            if args and all(isinstance(arg, str) for arg in args):  # such as a member of an enum
                stub.state = {ARGUMENTS: args}
            self._push(stub, 2 * OBJECT)

    def _new(self, count: int) -> None:
        """Creates an instance without calling its class; further arguments are dropped."""
        self._push(self._stub(self._pop_many(count)[0]), OBJECT)

    def _stub(self, of: Any) -> Stub:
        if not isinstance(of, StubClass):
            raise Refused(f"it instantiates a {type(of).__name__}")
        return Stub(of)

    def _build(self, arg: Any) -> None:
        """Sets the state of a stub; attributes of an ordered dict are dropped."""
        state, target = self._stack.pop(), self._stack[-1]
        if isinstance(state, tuple) and len(state) == 2:  # a dict of attributes, and one of slots
            state = state[0]
        if isinstance(target, Stub):
            if isinstance(state, dict):  # not copied: many objects may share one state
                target.state = state
        elif not isinstance(target, OrderedDict):
            raise Refused(f"it sets attributes of a {type(target).__name__}")


INTEGERS = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4")
TEXTS = ("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8")
BYTES = ("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8")
LITERALS = {"NONE", "FLOAT", "BINFLOAT", *INTEGERS, *TEXTS, *BYTES}
Action = Callable[[Machine, Any], object]
ACTIONS: dict[str, Action] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda machine, arg: None),
    **dict.fromkeys(("STRING", "BINSTRING", "SHORT_BINSTRING"), Machine._text),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), Machine._put),
    **dict.fromkeys(
        ("GET", "BINGET", "LONG_BINGET"), lambda machine, arg: machine._push(machine._memo[arg])
    ),
    "NEWTRUE": lambda machine, arg: machine._push(True),
    "NEWFALSE": lambda machine, arg: machine._push(False),
    "MARK": Machine._mark,
    "POP": Machine._pop,
    "POP_MARK": lambda machine, arg: machine._pop_marked(),
    "DUP": lambda machine, arg: machine._push(machine._stack[-1]),
    "BINPERSID": Machine._persistent,
    "EMPTY_TUPLE": lambda machine, arg: machine._push_sized(()),
    "TUPLE1": lambda machine, arg: machine._push_sized(tuple(machine._pop_many(1))),
    "TUPLE2": lambda machine, arg: machine._push_sized(tuple(machine._pop_many(2))),
    "TUPLE3": lambda machine, arg: machine._push_sized(tuple(machine._pop_many(3))),
    "TUPLE": lambda machine, arg: machine._push_sized(tuple(machine._pop_marked())),
    "EMPTY_LIST": lambda machine, arg: machine._push([], OBJECT),
    "LIST": lambda machine, arg: machine._push_sized(machine._pop_marked()),
    "APPEND": lambda machine, arg: machine._append(machine._pop_many(1)),
    "APPENDS": lambda machine, arg: machine._append(machine._pop_marked()),
    "EMPTY_DICT": lambda machine, arg: machine._push({}, OBJECT),
    "DICT": Machine._dict,
    "SETITEM": lambda machine, arg: machine._set(machine._pop_many(2)),
    "SETITEMS": lambda machine, arg: machine._set(machine._pop_marked()),
    "EMPTY_SET": lambda machine, arg: machine._push(set(), OBJECT),
    "ADDITEMS": Machine._add,
    "FROZENSET": lambda m, arg: m._push(build_frozenset(m._budget, m._pop_marked())),
    "GLOBAL": lambda machine, arg: machine._resolve(*arg.split(" ", 1)),
    "STACK_GLOBAL": lambda machine, arg: machine._resolve(*machine._pop_many(2)),
    "REDUCE": Machine._reduce,
    "NEWOBJ": lambda machine, arg: machine._new(2),
    "NEWOBJ_EX": lambda machine, arg: machine._new(3),
    "BUILD": Machine._build,
}


def run_pickle(
    content: bytes, storage: Callable[[Any], Any], budget: Budget, start: int = 0, *, known: Names
) -> tuple[Any, int]:
    """Runs the pickle at byte `start`; returns its object and the byte after its end.

    Raises:
        Refused: if it is damaged, not allowed or too expensive.
    """
    stream = io.BytesIO(content)
    stream.seek(start)
    try:
        return Machine(known, storage, budget).run(stream), stream.tell()
    except UsageError:
        raise
    except Exception as error:  # a hostile program can make any operation on plain data fail
        raise Refused(
            f"it is not a complete pickle ({type(error).__name__}: {shown(error)})"
        ) from error
