"""The house rules that no linter knows, as pure functions from sources to problems; test_tidy.py applies them.

Print, blind excepts, docstrings, TODO and dead code are ruff's, clean-up and checkpoints are flake8-async's.
"""

import ast
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

# --- what is read, and what is found --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """One Python file; `path` is from the project's root, with slashes."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        """Its syntax tree."""
        return ast.parse(self.text, self.path)

    @property
    def module(self) -> str:
        """Its name when imported."""
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    def problem(self, node: ast.AST, advice: str) -> "Problem":
        """What a rule found at `node`."""
        return Problem(self.path, getattr(node, "lineno", 1), advice)


@dataclass(frozen=True)
class Problem:
    """Where a rule is broken, and what to do about it."""

    path: str
    line: int
    advice: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.advice}"


Rule = Callable[[Source], Iterator[Problem]]


def imports(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """The dotted names that one statement imports: `from a.b import c` is `a.b.c`, for c may be a module."""
    if isinstance(node, ast.Import):
        yield from ((node, alias.name) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield from ((node, f"{node.module}.{alias.name}") for alias in node.names)


def all_imports(source: Source) -> Iterator[tuple[ast.AST, str]]:
    """Every import of a file, those inside functions too."""
    return chain.from_iterable(map(imports, ast.walk(source.tree)))


def is_within(name: str, package: str) -> bool:
    """Whether the dotted `name` is `package` or lies in it."""
    return f"{name}.".startswith(f"{package}.")


# --- the wall between the rooms -------------------------------------------------------------------------------------------

SHARED = {"errors", "config", "rendezvous", "browser_guard", "cluster_key", "http_paths", "http_server"}
"""Top-level modules that any room but the core may import."""
WALL = {
    "errors": set[str](),
    "rendezvous": {"errors"},
    "lmcache_keys": set[str](),
    "config_layers": {"errors", "lmcache_keys"},
    "gossip_config": {"config_layers", "core"},
    "config": {"config_layers", "core", "errors", "gossip_config", "lmcache_keys"},
    "browser_guard": {"config"},
    "http_paths": set(),
    "http_server": set[str](),
    "cluster_key": {"config", "errors"},
    "core": {"errors"},
    "wire": {"core", *SHARED},
    "store": {"core", *SHARED},
    "net": {"core", "wire", *SHARED},
    "engines": {"core", "wire", *SHARED},
    "client": {"core", "net", *SHARED},
    "node_store": {"core", "store", "net", *SHARED},
    "node": {"core", "wire", "store", "net", "node_store", *SHARED},
    "commands": {"core", "wire", "store", "net", "engines", "node", *SHARED},
    "demo": {"core", "engines", "commands", *SHARED},
    "cli": {"core", "wire", "store", "net", "engines", "node", "commands", "demo", *SHARED},
    "__init__": {"node", *SHARED},
    "__main__": {"cli"},
}
"""For each room of p2pkv, the other rooms that it may import."""


def import_wall(source: Source) -> Iterator[Problem]:
    """Rooms import in one direction only."""
    if not source.path.startswith("p2pkv/"):
        return
    room = source.path.split("/")[1].removesuffix(".py")
    if room not in WALL:
        yield source.problem(source.tree, f"room {room!r} has no place in the wall; give it one in WALL of tests/tidy.py")
        return
    for node, name in all_imports(source):
        if not is_within(name, "p2pkv"):
            continue
        other = name.removeprefix("p2pkv").removeprefix(".").split(".")[0]
        if other != room and other not in WALL[room]:
            allowed = ", ".join(sorted(WALL[room])) or "no other room"
            advice = f"{room} may not import p2pkv.{other}, only {allowed}: move the code, or pass it in"
            yield source.problem(node, advice)


CONFINED = {"msgpack": ("p2pkv/wire/",), "trio.run": ("p2pkv/cli.py",), "vllm": ("p2pkv/engines/vllm/",)}
"""Names of which p2pkv keeps all uses in one place."""


def confinement(source: Source) -> Iterator[Problem]:
    """Only wire/ knows msgpack; only the command line starts an event loop; only the connector knows vLLM."""
    if not source.path.startswith("p2pkv/"):
        return
    attributes = ((node, ast.unparse(node)) for node in ast.walk(source.tree) if isinstance(node, ast.Attribute))
    for node, name in chain(all_imports(source), attributes):
        for confined, places in CONFINED.items():
            if is_within(name, confined) and not source.path.startswith(places):
                yield source.problem(node, f"{confined} is used in {', '.join(places)} only; call what stands there")


# --- the pure core --------------------------------------------------------------------------------------------------------

PURE_STDLIB = {"array", "bisect", "collections", "dataclasses", "enum", "functools", "hashlib", "heapq", "itertools", "math"}
PURE_NAMES = {"numpy", "operator", "random.Random", "re", "struct", "sys.byteorder", "typing"}
PURE_MODULES = {*PURE_STDLIB, *PURE_NAMES, "annotated_types", "p2pkv.core", "p2pkv.errors"}
"""All that core/ may import. `Random` is there as the type of a parameter."""
IMPURE_BUILTINS = {
    "open": "the shell does all input and output",
    "print": "the core never reports; return an effect",
    "input": "the shell does all input and output",
    "hash": "it depends on PYTHONHASHSEED; use hashlib",
    "id": "it differs from run to run; name the thing",
    "Random": "randomness is a parameter; take a Random",
}


def core_purity(source: Source) -> Iterator[Problem]:
    """The core has no input, output, clock or randomness of its own."""
    if not source.path.startswith("p2pkv/core/"):
        return
    for node, name in all_imports(source):
        if not any(is_within(name, module) for module in PURE_MODULES):
            advice = f"the core may not import {name}: take what it gives as a parameter or an event"
            yield source.problem(node, f"{advice}; or, if it is pure, add it to PURE_MODULES of tests/tidy.py")
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in IMPURE_BUILTINS:
            yield source.problem(node, f"no {node.func.id}() in the core: {IMPURE_BUILTINS[node.func.id]}")


# --- order: what a set yields first depends on PYTHONHASHSEED -------------------------------------------------------------

SET_TYPES = {"set", "frozenset", "Set", "AbstractSet", "MutableSet"}
SET_METHODS = {"union", "intersection", "difference", "symmetric_difference", "copy"}
ORDER_TAKERS = {"list", "tuple", "iter", "enumerate", "zip", "map", "filter", "chain", "deque", "join"}
ORDER_IGNORERS = {"sorted", "set", "frozenset", "sum", "min", "max", "any", "all"}
Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


def core_order(source: Source) -> Iterator[Problem]:
    """The core never goes through a set in the set's own order: an effect could depend on it.

    Known as a set is what looks like one, and every name or attribute that the same file declares or assigns as one.
    """
    if not source.path.startswith("p2pkv/core/"):
        return
    nodes = list(ast.walk(source.tree))
    fields = chain.from_iterable(node.body for node in nodes if isinstance(node, ast.ClassDef))
    attributes = {f".{name}" for name in _declared_sets(fields)} | {
        f".{name.rpartition('.')[2]}" for name in _declared_sets(nodes) if "." in name
    }
    everywhere = attributes | set(_declared_sets(source.tree.body))
    found: dict[Problem, None] = {}
    for scope in [source.tree, *(node for node in nodes if isinstance(node, Function))]:
        local = set() if scope is source.tree else set(_declared_sets(ast.walk(scope)))
        for iterated in chain.from_iterable(map(_iterated, ast.walk(scope))):
            if _is_set(iterated, everywhere | local):
                advice = f"{ast.unparse(iterated)} is a set, its order differs from run to run: use sorted(...), or keep a dict"
                found[source.problem(iterated, advice)] = None
    yield from found


def _declared_sets(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """What these nodes declare or assign as a set, as it is written: `keys`, `self.keys`."""
    for node in nodes:
        match node:
            case ast.arg(arg=name, annotation=ast.expr() as annotation) if _is_set_type(annotation):
                yield name
            case ast.AnnAssign(target=target, annotation=annotation) if _is_set_type(annotation):
                yield ast.unparse(target)
            case ast.Assign(targets=[target], value=value) if _is_set(value, set()):
                yield ast.unparse(target)


def _is_set_type(annotation: ast.expr) -> bool:
    outermost = annotation.value if isinstance(annotation, ast.Subscript) else annotation
    return ast.unparse(outermost).rpartition(".")[2] in SET_TYPES


def _is_set(node: ast.expr, known: set[str]) -> bool:
    """Whether `node` is a set; `known` has the names that are, attributes with a dot before them."""
    match node:
        case ast.Set() | ast.SetComp() | ast.Call(func=ast.Name(id="set" | "frozenset")):
            return True
        case ast.Name(id=name):
            return name in known
        case ast.Attribute(attr=name):
            return f".{name}" in known
        case ast.Subscript(value=ast.Name(id="set" | "frozenset")):
            return True  # set[str]()
        case ast.Call(func=ast.Subscript() as constructor):
            return _is_set(constructor, known)
        case ast.Call(func=ast.Attribute(value=value, attr=method)) if method in SET_METHODS:
            return _is_set(value, known)
        case ast.BinOp(left=left, op=ast.BitOr() | ast.BitAnd() | ast.Sub() | ast.BitXor(), right=right):
            return any(_is_set(side, known) or _is_view(side) for side in (left, right))
    return False


def _is_view(node: ast.expr) -> bool:
    """Whether it is a dict's keys or items: ordered, but what `&` and the like make of them isn't."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in {"keys", "items"}


def _iterated(node: ast.AST) -> Iterator[ast.expr]:
    """The expressions whose own order shows in what `node` does."""
    match node:
        case ast.For():
            yield node.iter
        case ast.ListComp() | ast.DictComp():
            yield from (generator.iter for generator in node.generators)
        case ast.Starred():
            yield node.value
        case ast.Call(func=ast.Attribute(value=value, attr="pop"), args=[]):
            yield value
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=arguments):
            for argument in arguments:
                if isinstance(argument, ast.GeneratorExp) and name not in ORDER_IGNORERS:
                    yield from (generator.iter for generator in argument.generators)
                elif name in ORDER_TAKERS:
                    yield argument


# --- no torch in the node -------------------------------------------------------------------------------------------------

HEAVY = ("torch", "transformers", "tokenizers", "vllm")
"""What the extra `engines` brings, but for numpy, and vLLM: a node starts without it."""


def heavy_imports(sources: Iterable[Source], roots: Iterable[str]) -> Iterator[Problem]:
    """Nothing that is imported along with `roots` imports an engine's libraries."""
    known = {source.module: source for source in sources}
    waiting, seen = [(root, root) for root in roots], set[str]()
    while waiting:
        module, trail = waiting.pop()
        if module not in known or module in seen:
            continue
        seen.add(module)
        package = module.rpartition(".")[0]
        waiting.append((package, f"{trail} > {package}"))
        for node, name in _imports_at_import(known[module].tree):
            if any(is_within(name, heavy) for heavy in HEAVY):
                advice = f"the node would load {name} ({trail}): import it inside the function that needs it"
                yield known[module].problem(node, advice)
            target = name if name in known else name.rpartition(".")[0]
            waiting.append((target, f"{trail} > {target}"))


def _imports_at_import(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """The imports that run when a module is imported: not those in functions, nor those for type checkers."""
    if isinstance(node, Function):
        return
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        children: Iterable[ast.AST] = node.orelse
    else:
        children = ast.iter_child_nodes(node)
    yield from imports(node)
    for child in children:
        yield from _imports_at_import(child)


# --- sizes ----------------------------------------------------------------------------------------------------------------

FILE_LINES = 400
TEST_FILE_LINES = 600
FUNCTION_LINES = 60
"""Without the docstring: saying more must not cost anything."""
SIZE_EXCEPTIONS: dict[str, str] = {}
"""Why this file (`path`) or function (`path::name`) may be longer."""


def sizes(source: Source) -> Iterator[Problem]:
    """Files and functions fit in a head."""
    limit = TEST_FILE_LINES if source.path.startswith("tests/") else FILE_LINES
    line_count = len(source.text.splitlines())
    if line_count > limit and source.path not in SIZE_EXCEPTIONS:
        yield source.problem(source.tree, f"{line_count} lines, {limit} are allowed: what is the second thing in this file?")
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or f"{source.path}::{node.name}" in SIZE_EXCEPTIONS:
            continue
        line_count = _line_count(node) - (_line_count(node.body[0]) if ast.get_docstring(node) else 0)
        if line_count > FUNCTION_LINES:
            advice = f"{node.name} has {line_count} lines, {FUNCTION_LINES} are allowed: give its parts names"
            yield source.problem(node, advice)


def _line_count(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


# --- the top of the tree --------------------------------------------------------------------------------------------------

FOLDERS = {"p2pkv", "topology", "sims", "tests", "docs"}
FILES = {"pyproject.toml", "constraints.txt", "requirements-vllm.txt", "README.md", "CHANGELOG.md", "LICENSE", "dev"}


def top_level(paths: Iterable[str]) -> Iterator[Problem]:
    """What may stand at the top of the tree, besides dot-files."""
    for name in sorted({path.split("/")[0] for path in paths}):
        if not name.startswith(".") and name not in FOLDERS | FILES:
            yield Problem(name, 1, "doesn't belong at top level; put it into p2pkv, topology, sims, tests or docs")
