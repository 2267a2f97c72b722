"""Running somebody else's jinja template within bounds of time and size, in this process and in any thread.

    source --parse, count, put a check around loops, `~` and literals--> code --run--> text

jinja2's immutable sandbox keeps a template from Python's insides, but lets it run forever and fill the memory. Here
filters and methods are those of a list; every loop step, call and operation looks at the clock; and every value is
measured where it is made, so that no single step can work on more than `TemplateLimits.characters`. Nothing is computed
while compiling.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from functools import cache, wraps
from typing import TYPE_CHECKING, Any

from vlkit.config import Config, Positive, Size
from vlkit.errors import TemplateError

if TYPE_CHECKING:
    import jinja2

BREAK = "\ufdd0"
"""A noncharacter inside special names that a person typed: Unicode keeps them out of interchanged text."""
ANSWER, ANSWER_END = "\ufdd1", "\ufdd2"
"""Noncharacters around what the template marks as the assistant's by {% generation %}."""


class TemplateLimits(Config):
    """How much a template may do.

    Attributes:
        seconds: Time for one conversation.
        characters: Length of the result, and of every value on the way.
        nodes: Size of the template, in nodes of its syntax tree.
        depth: Nesting of the tree.
        source: Length of the template itself, in characters.
    """

    seconds: Positive = 2.0
    characters: Size = 1_000_000
    nodes: Size = 20_000
    depth: Size = 100
    source: Size = 200_000


def compile_template(source: str, limits: TemplateLimits) -> jinja2.Template:
    """The template, ready for `generate`.

    Raises:
        TemplateError: It is too large, loads another template, or uses a filter that is not allowed.
        Exception: jinja2's errors, and Python's own.
    """
    environment = _environment()
    tree = environment.parse(source)
    _check_tree(tree, limits, environment.filters)
    return environment.from_string(_bounded_tree(tree))


def generate(template: jinja2.Template, variables: Mapping[str, Any], limits: TemplateLimits) -> str:
    """The text that a template makes of plain values.

    Raises:
        TemplateError: It exceeds a limit, or does what is not allowed.
        Exception: Whatever else a template can make Python raise.
    """
    budget = _Budget(limits)
    token = _BUDGET.set(budget)
    chunks: list[str] = []
    length = 0
    try:
        budget.measure(list(variables.values()))
        for chunk in template.generate(**variables):
            budget.tick()
            length += len(chunk)
            if length > limits.characters:
                raise TemplateError(f"the result is longer than {limits.characters} characters")
            chunks.append(chunk)
    finally:
        _BUDGET.reset(token)
    return "".join(chunks)


class _Budget:
    """What is left for one rendering."""

    def __init__(self, limits: TemplateLimits) -> None:
        self.limits = limits
        self.deadline = time.monotonic() + limits.seconds
        self.made = 0

    def tick(self) -> None:
        if time.monotonic() > self.deadline:
            raise TemplateError(f"stopped after {self.limits.seconds} seconds")

    def room(self, size: int) -> None:
        """Refuse a value before it is made."""
        self.tick()
        if size > self.limits.characters:
            raise TemplateError(f"a value of more than {self.limits.characters} characters")

    def measure(self, value: Any) -> Any:
        """The value, if its text is within bounds; what was made in all is bounded too."""
        self.room(0)
        size, stack = 0, [value]
        while stack:
            each = stack.pop()
            if isinstance(each, str):
                size += len(each)
            elif isinstance(each, int):
                size += 1 + each.bit_length() // 3
            elif isinstance(each, range):
                size += len(each)
            elif isinstance(each, Mapping):
                size += len(each)
                stack += [*each.keys(), *each.values()]
            elif isinstance(each, Collection):
                size += len(each)
                stack += each
            elif each is not value and not _is_scalar(each):
                kind = type(each).__name__
                raise TemplateError(f"a list holds a {kind}; it can hold text, numbers, lists and dictionaries")
            size += 1
            if size > self.limits.characters:
                self.room(size)
        self.made += size
        if self.made > 64 * self.limits.characters:
            raise TemplateError(f"values of more than {64 * self.limits.characters} characters in all")
        return self._bounded(value) if isinstance(value, Iterator) else value

    def _bounded(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            yield self.measure(value)


_BUDGET: ContextVar[_Budget] = ContextVar("budget")
_STR_METHODS = """
    capitalize count endswith find index isalnum isalpha isdecimal isdigit islower isnumeric isspace istitle isupper
    join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip split splitlines
    startswith strip swapcase title upper
"""
_FILTERS = """
    abs capitalize count d default dictsort first float groupby int items last length list lower map max min reject
    rejectattr reverse select selectattr sort string title unique upper
"""
_METHODS: dict[type, frozenset[str]] = {
    str: frozenset(_STR_METHODS.split()),
    dict: frozenset(("get", "items", "keys", "values")),
    list: frozenset(("index", "count")),
    tuple: frozenset(("index", "count")),
}


def _is_scalar(value: Any) -> bool:
    import jinja2

    return value is None or isinstance(value, (float, jinja2.Undefined))


def _check_tree(tree: Any, limits: TemplateLimits, filters: Mapping[str, Any]) -> None:
    from jinja2 import nodes

    count, level = 0, [tree]
    for _ in range(limits.depth):
        count += len(level)
        if count > limits.nodes:
            raise TemplateError(f"the template has more than {limits.nodes} nodes")
        below = []
        for node in level:
            if isinstance(node, (nodes.Import, nodes.FromImport, nodes.Include, nodes.Extends)):
                raise TemplateError(f"line {node.lineno}: a chat template cannot load another ({type(node).__name__})")
            if isinstance(node, nodes.Filter) and node.name not in filters:
                raise TemplateError(
                    f"line {node.lineno}: the filter {node.name!r} is not among {', '.join(sorted(filters))}"
                )
            below += node.iter_child_nodes()
        level = below
        if not level:
            return
    raise TemplateError(f"the template is nested deeper than {limits.depth} levels")


def _bounded_tree(tree: Any) -> Any:
    """The tree with a check around what jinja2 offers no hook for: loops, `~`, and literals of containers."""
    from jinja2 import nodes
    from jinja2.visitor import NodeTransformer

    class Bounded(NodeTransformer):
        def _through(self, node: Any, name: str) -> Any:
            return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)

        def visit_For(self, node: Any) -> Any:  # noqa: N802
            self.generic_visit(node)
            node.iter = self._through(node.iter, " loop")
            return node

        def visit_Concat(self, node: Any) -> Any:  # noqa: N802
            self.generic_visit(node)
            return self._through(nodes.List(node.nodes, lineno=node.lineno), " concat")

        def _literal(self, node: Any) -> Any:
            self.generic_visit(node)
            return node if getattr(node, "ctx", "load") == "store" else self._through(node, " value")

        visit_List = visit_Tuple = visit_Dict = _literal  # noqa: N815

    return Bounded().visit(tree)


@cache
def _environment() -> jinja2.Environment:
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %}: what the assistant says, as transformers marks it for training."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            marks = [nodes.Output([nodes.TemplateData(mark)], lineno=line) for mark in (ANSWER, ANSWER_END)]
            return [marks[0], *body, marks[1]]

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            budget = _BUDGET.get()
            if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
                bits = left.bit_length() * max(right, 1) if operator == "**" else left.bit_length() + right.bit_length()
                budget.room(bits // 3)
                if bits > 4096:
                    raise TemplateError(f"a number of more than 4096 bits ({operator})")
            elif operator == "*":
                length = max((len(each) for each in (left, right) if isinstance(each, (str, list, tuple))), default=0)
                times = max((each for each in (left, right) if isinstance(each, int)), default=1)
                budget.room(length * times)
            elif operator == "%" and isinstance(left, str):
                raise TemplateError("texts cannot be formatted with %; use ~")
            elif operator == "+" and isinstance(left, (str, list, tuple)) and isinstance(right, (str, list, tuple)):
                budget.room(len(left) + len(right))
            return budget.measure(super().call_binop(context, operator, left, right))

        def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
            budget = _BUDGET.get()
            budget.tick()
            owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
            methods = _METHODS.get(type(owner))
            if methods is not None:
                if name not in methods:
                    kind, known = type(owner).__name__, ", ".join(sorted(methods))
                    raise TemplateError(f"the method {name!r} of a {kind} is not among {known}")
                if isinstance(owner, str):
                    kwargs = {key: value for key, value in kwargs.items() if not key.startswith("_")}  # jinja2's own
                    return budget.measure(_str_method(owner, name, *args, **kwargs))
            elif __obj not in callables and not (_is_jinjas(__obj) or _is_jinjas(owner)):
                raise TemplateError(f"{name or type(__obj).__name__!r} cannot be called")
            return budget.measure(super().call(__context, __obj, *args, **kwargs))

        @staticmethod
        def concat(chunks: Iterable[str]) -> str:
            chunks = list(chunks)
            _BUDGET.get().room(sum(map(len, chunks)))
            return "".join(chunks)

    environment = Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,  # the optimiser would run constant expressions while compiling, outside every limit
        extensions=[Generation, "jinja2.ext.loopcontrols"],
        finalize=_printable,
    )
    environment.filters = {name: _measured(function) for name, function in _filters(environment).items()}
    environment.globals = {
        **{name: environment.globals[name] for name in ("range", "dict", "cycler", "joiner", "namespace")},
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
    callables = list(environment.globals.values())
    return environment


def _is_jinjas(value: Any) -> bool:
    """Whether it is an object of jinja2 itself: a macro, a loop, a namespace, ..."""
    return type(value).__module__.startswith("jinja2.")


_WRITTEN_BREAK = re.compile(r"(?<!\\)((?:\\\\)*)\\ufdd0")


def _printable(value: Any) -> Any:
    """What an expression prints; objects of jinja2 itself have no text."""
    import jinja2

    if isinstance(value, (list, tuple, dict)):
        # Python writes the noncharacter inside of them as six characters, which nothing would take out again.
        return _WRITTEN_BREAK.sub(lambda found: found[1] + BREAK, str(value))
    if value is None or isinstance(value, (str, int, float, jinja2.Undefined)):
        return value
    raise TemplateError(f"a {type(value).__name__} cannot be written out")


def _str_method(text: str, name: str, *args: Any, **kwargs: Any) -> Any:
    budget = _BUDGET.get()
    if name == "join":
        return _join(args[0], text) if args else text.join()  # type: ignore[call-arg]
    if name == "replace" and len(args) >= 2:
        return _replace(text, *args)
    if name in ("strip", "lstrip", "rstrip") and args and len(args[0] or "") > 100:
        raise TemplateError(f"{name}() takes at most 100 characters to strip, found {len(args[0])}")
    budget.room(len(text))
    return getattr(text, name)(*args, **kwargs)


def _join(values: Any, between: Any = "", attribute: Any = None) -> str:
    budget = _BUDGET.get()
    if attribute is not None:
        values = [value.get(attribute, "") for value in values]
    texts, size = [], 0
    for value in values:
        texts.append(str(_printable(value)))
        size += len(texts[-1]) + len(between)
        budget.room(size)
    return str(between).join(texts)


def _replace(text: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, old, new = str(text), str(old), str(new)
    times = text.count(old) if count is None else min(text.count(old), max(count, 0))
    _BUDGET.get().room(len(text) + times * max(len(new) - len(old), 0))
    return text.replace(old, new, -1 if count is None else count)


def _indent(text: Any, width: Any = 4, first: bool = False, blank: bool = False) -> str:
    text, step = str(text), width if isinstance(width, str) else " " * min(width, 100)
    lines = text.splitlines(keepends=True)
    _BUDGET.get().room(len(text) + len(step) * len(lines))
    return "".join(
        (step if (index or first) and (blank or line.strip()) else "") + line for index, line in enumerate(lines)
    )


def _tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
    if indent is not None and not 0 <= indent <= 16:
        raise TemplateError(f"tojson: indent must be 0 to 16, found {indent}")
    if unknown := set(options) - {"separators", "sort_keys"}:
        raise TemplateError(f"tojson: unknown option {sorted(unknown)[0]!r}")
    _BUDGET.get().room(0)
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, **options)


def _trim(text: Any, characters: str | None = None) -> str:
    return str(_str_method(str(text), "strip", characters))


def _round(value: float, precision: int = 0) -> float:
    if abs(precision) > 20:
        raise TemplateError(f"round: precision must be -20 to 20, found {precision}")
    return round(float(value), precision)


def _sum(values: Iterable[Any], start: float = 0) -> Any:
    numbers = list(values)
    if not all(isinstance(number, (int, float)) for number in (*numbers, start)):
        raise TemplateError("sum adds numbers only")
    return sum(numbers, start)


def _concat(values: Sequence[Any]) -> str:
    return _join([_printable(value) for value in values])


def _loop(values: Iterable[Any]) -> Iterator[Any]:
    budget = _BUDGET.get()
    for value in values:
        budget.tick()
        yield value


def _filters(environment: Any) -> dict[str, Callable[..., Any]]:
    return {
        **{name: environment.filters[name] for name in _FILTERS.split()},
        "indent": _indent,
        "join": lambda values, d="", attribute=None: _join(values, d, attribute),
        "replace": _replace,
        "round": _round,
        "safe": str,
        "string": lambda value: value if isinstance(value, str) else str(_printable(value)),
        "sum": _sum,
        "tojson": _tojson,
        "trim": _trim,
        # Names that no template can spell: see _bounded_tree.
        " loop": _loop,
        " concat": _concat,
        " value": lambda value: value,
    }


def _measured(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return _BUDGET.get().measure(function(*args, **kwargs))

    return (
        wraps(function)(run) if hasattr(function, "__dict__") else run
    )  # keeps jinja2's mark for the context argument


def _raise_exception(message: str) -> None:
    raise TemplateError(f"the template refuses the conversation: {str(message)[:1000]}")


def _strftime_now(format: str) -> str:
    if len(format) > 100:
        raise TemplateError(f"strftime_now: a format of {len(format)} characters; at most 100")
    return datetime.now().astimezone().strftime(format)
