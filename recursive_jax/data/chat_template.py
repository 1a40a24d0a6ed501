"""Chat templates are Jinja programs of strangers: they run sandboxed, in the environment that `transformers` gives
them, and under limits of steps, time and size. What a template does wrong is said with its line."""

from __future__ import annotations

import contextvars
import datetime
import functools
import json
import re
import string
import time
import uuid
from collections.abc import Callable
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from recursive_jax.errors import InputError

STEPS = 1_000_000  # turns of loops, calls of macros
SECONDS = 10.0
SIZE = 2**24  # characters of what is rendered, and of any text on the way
PARTS = 2**20  # of a list in lists
BITS = 10_000  # of an integer
NUMBER = 1_000_000  # the greatest integer that a function or filter is given

OPEN, CLOSE = (f"<{uuid.uuid4().hex}>" for _ in range(2))  # around what the assistant wrote; no text holds them


class TooMuch(jinja2.TemplateError):
    """A limit was reached."""


class _Spent:
    """What one rendering has used."""

    def __init__(self) -> None:
        self.steps = self.size = 0
        self.end = time.monotonic() + SECONDS

    def step(self) -> None:
        """One turn of a loop, or call of a macro."""
        self.steps += 1
        if self.steps > STEPS:
            raise TooMuch(f"more than {STEPS:,} turns of loops and macros")
        self.clock()

    def clock(self) -> None:
        if time.monotonic() > self.end:
            raise TooMuch(f"more than {SECONDS:g} seconds")

    def written(self, size: int) -> None:
        self.size += size
        if self.size > SIZE:
            raise TooMuch(f"it writes more than {SIZE:,} characters")


_spent: contextvars.ContextVar[_Spent] = contextvars.ContextVar("spent")

#: Functions, methods and filters that make a value as large as a number they are given says.
_SIZED = frozenset(
    ("range", "safe_range", "center", "ljust", "rjust", "zfill", "indent", "expandtabs", "batch", "slice", "wordwrap")
    + ("tojson", "round", "truncate", "string", "format")
)


def _check_size(size: int) -> None:
    if size > SIZE:
        raise TooMuch(f"a value of {size:,} characters or parts, at most {SIZE:,}")


def _size(value: Any) -> int:
    """Characters and parts that a value has when it is written out: what a list holds twice counts twice, but is looked
    at once. Raises TooMuch where they are too many."""
    if isinstance(value, (str, bytes)):
        total = len(value)
    elif isinstance(value, (list, tuple, dict)):
        total, parts = _written_out(value)
        if parts > PARTS:
            raise TooMuch(f"a value of more than {PARTS:,} parts")
    else:
        return 8
    _check_size(total)
    return total


def _written_out(value: list | tuple | dict) -> tuple[int, int]:
    """Characters, and parts, of a value in lists and dicts: sixty lists that each hold the one before twice are sixty
    looks, though written out they have 2 ** 60 parts."""
    known: dict[int, tuple[int, int]] = {}  # by id: all of them are held by `value`
    waiting: list[Any] = [value]
    while waiting:
        held = waiting[-1]
        inside = [x for pair in held.items() for x in pair] if isinstance(held, dict) else held
        holders = [x for x in inside if isinstance(x, (list, tuple, dict))]
        unknown = [x for x in holders if id(x) not in known]
        if len(waiting) + len(unknown) + len(known) > PARTS:
            raise TooMuch(f"a value of more than {PARTS:,} parts")
        if unknown:
            waiting += unknown
            continue
        waiting.pop()
        texts = [x for x in inside if isinstance(x, (str, bytes))]
        sizes = [known[id(x)] for x in holders] + [(len(x) + 1, 1) for x in texts]
        known[id(held)] = len(held) + 1 + sum(size for size, _ in sizes), 1 + sum(parts for _, parts in sizes)
    return known[id(value)]


def _held(value: Any) -> Any:
    """A value, if it is not too large."""
    _size(value)
    return value


def _check_call(name: str, subject: Any, args: tuple, named: dict[str, Any]) -> None:
    """Refuses what would make a huge value before it is made."""
    _spent.get().clock()
    given = [*args, *named.values()]
    for value in (subject, *given):
        _size(value)
    numbers = [abs(x) for x in given if isinstance(x, int)]
    if name in _SIZED and any(n > NUMBER for n in numbers):
        raise TooMuch(f"{name}({max(numbers):,}): at most {NUMBER:,}")
    if not isinstance(subject, str):
        return
    if name in ("expandtabs", "indent"):
        _check_size(max([8, *numbers]) * (len(subject) + 1))
    elif name == "replace" and len(given) >= 2 and isinstance(given[0], str) and isinstance(given[1], str):
        _check_size(len(subject) + subject.count(given[0]) * len(given[1]))
    elif name == "join" and given and isinstance(given[0], (list, tuple)):
        _check_size(_size(given[0]) + len(subject) * len(given[0]))
    elif name in ("format", "format_map"):
        _check_format(subject)


def _check_format(text: str) -> None:
    """Refuses widths of five digits and more, or given by an argument, in both kinds of formats."""
    try:
        fields = [spec or "" for _, field, spec, _ in string.Formatter().parse(text) if field is not None]
    except ValueError:
        fields = []  # no format of braces
    if any(re.search(r"\d{5,}|\{", spec) for spec in fields):
        raise TooMuch("format(...) to a width of five digits or more, or given by an argument")
    if re.search(r"%[#0\- +]*(\d{5,}|\*|\d*\.(\d{5,}|\*))", text):
        raise TooMuch("% to a width of five digits or more, or given by an argument")


class _Limits(Extension):
    """Counts: a step at the beginning of the body of every loop, macro and call block, and the template's own text
    where it is written."""

    def _step(self) -> str:
        _spent.get().step()
        return ""

    def _wrote(self, size: int) -> str:
        _spent.get().written(size)
        return ""

    def _join(self, *parts: Any) -> str:
        for part in parts:
            _size(part)
        texts = [str(part) for part in parts]
        _check_size(sum(map(len, texts)))
        return "".join(texts)

    def _seen(self, value: Any) -> Any:
        _spent.get().clock()
        return _held(value)

    def counted(self, tree: nodes.Template) -> nodes.Template:
        _watch(tree, self)
        for kind in (nodes.For, nodes.Macro, nodes.CallBlock):
            for node in list(tree.find_all(kind)):
                node.body.insert(0, self.statement("_step", [], node.lineno))
        return tree

    def statement(self, name: str, args: list[nodes.Expr], line: int) -> nodes.Node:
        return nodes.ExprStmt(self.call_method(name, args)).set_lineno(line)


def _watch(node: nodes.Node, limits: _Limits) -> None:
    """`a ~ b`, literals of lists and dicts, and what is compared, as calls that look at sizes; text that is written
    behind a call that counts it."""
    for field, value in list(node.iter_fields()):
        new: list[Any] = []
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, nodes.Node):
                _watch(item, limits)
                line = item.lineno
                if isinstance(item, nodes.Concat):
                    item = limits.call_method("_join", item.nodes).set_lineno(line)
                elif isinstance(item, (nodes.List, nodes.Tuple, nodes.Dict)) and getattr(item, "ctx", "load") == "load":
                    item = limits.call_method("_seen", [item]).set_lineno(line)
                elif isinstance(item, nodes.Compare):
                    item.expr = limits.call_method("_seen", [item.expr]).set_lineno(line)
                    for operand in item.ops:
                        operand.expr = limits.call_method("_seen", [operand.expr]).set_lineno(line)
                elif isinstance(item, nodes.Output):
                    size = sum(len(part.data) for part in item.nodes if isinstance(part, nodes.TemplateData))
                    if size and isinstance(value, list):
                        new.append(limits.statement("_wrote", [nodes.Const(size)], line))
            new.append(item)
        setattr(node, field, new if isinstance(value, list) else new[0])


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: its content between two marks that are taken out after rendering."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own interface)

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark")
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, caller):
        return f"{OPEN}{caller()}{CLOSE}"


class _Environment(ImmutableSandboxedEnvironment):
    """Looks at sizes before they are made. Constants are not folded: that would run before anything counts."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols, _Limits],
            optimized=False,
            finalize=self._written,
        )
        self.filters = {name: _watched(name, function) for name, function in self.filters.items() if name != "urlize"}
        self.filters["tojson"] = _watched("tojson", _tojson)
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _fail
        self.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)

    @staticmethod
    def _written(value: Any) -> Any:
        _spent.get().written(_size(value))
        return value

    def _generate(self, source: nodes.Template, *args: Any, **more: Any) -> str:
        return super()._generate(self.extensions[_Limits.identifier].counted(source), *args, **more)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _spent.get().clock()
        long = lambda x: isinstance(x, (str, bytes, list, tuple))
        if operator == "*":
            for a, b in ((left, right), (right, left)):
                if long(a) and isinstance(b, int):
                    _check_size(_size(a) * max(0, b))
            if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > BITS:
                raise TooMuch("a number of thousands of digits")
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * max(0, right) > BITS:
                raise TooMuch("a number of thousands of digits")
        elif operator == "+" and long(left) and long(right):
            _check_size(len(left) + len(right))
        elif operator == "%" and isinstance(left, str):
            _check_format(left)
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Any:
        found = super().wrap_str_format(value)
        if found is not None:
            _check_call(value.__name__, value.__self__, (), {})
        return found

    def call(__self, __context: Any, __obj: Any, *args: Any, **named: Any) -> Any:
        _check_call(getattr(__obj, "__name__", "a call"), getattr(__obj, "__self__", None), args, named)
        return _held(super().call(__context, __obj, *args, **named))


def _watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that looks at what it is given and at what it gives."""

    @functools.wraps(function)
    def watched(*args: Any, **named: Any) -> Any:
        skip = 1 if hasattr(function, "jinja_pass_arg") else 0
        _check_call(name, args[skip] if len(args) > skip else None, args[skip + 1 :], named)
        return _held(function(*args, **named))

    return watched


def _tojson(x: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _fail(message: str) -> None:
    raise jinja2.TemplateError(message)


@functools.lru_cache(maxsize=64)
def _compiled(source: str) -> jinja2.Template:
    if len(source) > 2**20:
        raise InputError(f"the chat template has {len(source):,} characters, at most {2**20:,} are read")
    try:
        return _Environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"the chat template is not valid Jinja: {error} (line {error.lineno})") from None
    except (jinja2.TemplateError, RecursionError, SyntaxError, ValueError, MemoryError) as error:
        raise InputError(f"the chat template is not valid Jinja: {type(error).__name__}: {error}") from None


def render_template(source: str, **variables: Any) -> str:
    """What a template makes of its variables. Raises InputError where it is not valid, refuses them, or does too much,
    with the line."""
    template = _compiled(source)
    token = _spent.set(_Spent())
    try:
        return "".join(template.generate(**variables))
    except Exception as error:  # whatever a program may raise
        what = "stopped" if isinstance(error, TooMuch) else "refuses these messages"
        kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
        line = _line_of(error)
        where = f" (line {line} of the template)" if line else ""
        raise InputError(f"the chat template {what}: {kind}{error}{where}") from None
    finally:
        _spent.reset(token)


def _line_of(error: BaseException) -> int | None:
    """The template's own line: Jinja writes it into the traceback."""
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return line
