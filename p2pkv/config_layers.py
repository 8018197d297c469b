"""Where a configuration comes from: a yaml file and the environment, put over each other, the later the stronger."""

from collections.abc import Hashable, Mapping
from difflib import get_close_matches
from pathlib import Path

import yaml
from pydantic import ValidationError

from p2pkv.errors import ConfigError
from p2pkv.lmcache_keys import ALIASES, LMCACHE_KEYS, MEANINGLESS_KEYS

_OTHER_VARIABLES = frozenset({"P2PKV_CONFIG_FILE", "P2PKV_RUNTIME_DIR", "P2PKV_TOKEN"})


def items(value: object) -> object:
    """A list as an environment variable has it: `a, b` or `[a, b]`."""
    return tuple(part.strip() for part in value.strip("[] ").split(",")) if isinstance(value, str) else value


def number(value: object) -> object:
    """Not `true`, which Python would take for 1."""
    if isinstance(value, bool):
        raise ValueError(f"must be a number, not {value}")
    return value


def mapping(value: object) -> object:
    """A mapping as an environment variable has it: `{key: value}`."""
    if not isinstance(value, str):
        return value
    try:
        return yaml.load(value, _UniqueKeyLoader)  # noqa: S506  # a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError("must be a mapping, as {preset: wan}") from error


class Layers:
    """Values put over each other, the later the stronger, and what is wrong with their keys."""

    def __init__(self, fields: frozenset[str]) -> None:
        self.values: dict[str, object] = {}
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self._fields = fields
        self._origins: dict[str, str] = {}

    def add(self, layer: Mapping[str, object], prefix: str) -> None:
        """Put one layer on top; `prefix` makes a key the name that the user wrote. A null says "as by default"."""
        own: dict[str, str] = {}
        for key, value in layer.items():
            shown = prefix + key.upper() if prefix else key
            field = ALIASES.get(key, key)
            if field in self._fields:
                meant = self._first_port(shown, value) if key == "lmcache_worker_ports" else value
                if field in own and self.values.get(field) != meant:
                    self.problems.append(f"{shown}: contradicts {own[field]}, which means the same")
                own[field] = shown
                self._put(field, meant, shown)
            elif key in MEANINGLESS_KEYS:
                self.warnings.append(f"{shown} has no meaning here: {MEANINGLESS_KEYS[key]}")
            else:
                near = get_close_matches(key.lower(), sorted(self._fields | LMCACHE_KEYS), n=1)
                hint = f"; did you mean {prefix + near[0].upper() if prefix else near[0]}?" if near else ""
                self.problems.append(f"{shown}: unknown key{hint}")

    def add_problems(self, error: ValidationError) -> None:
        """Say each of pydantic's findings in a sentence that begins with the name that the user wrote."""
        for found in error.errors(include_url=False):
            if found["type"] == "default_factory_not_called":  # it depends on a field that has a problem of its own
                continue
            field, *place = found["loc"]
            name = "".join([self._origins.get(str(field), str(field)), *(f"[{part}]" for part in place)])
            if found["type"] == "missing":
                text = "is required"
            elif found["type"] == "extra_forbidden":
                text = "unknown key"
            elif found["type"] == "value_error":
                text = str(found["ctx"]["error"])
            else:
                text = f"{found['msg'].removeprefix('Input ')}, not {_short(found['input'])}"
            self.problems.append(f"{name}: {text}")

    def _put(self, field: str, value: object, shown: str) -> None:
        if value is None:
            self.values.pop(field, None)
        else:
            self.values[field] = value
            self._origins[field] = shown

    def _first_port(self, shown: str, value: object) -> object:
        ports = items(value)
        if not isinstance(ports, list | tuple) or not ports:
            return value
        if len(ports) > 1:
            self.warnings.append(f"{shown}: one websocket port serves all workers, {ports[0]} is used")
        return ports[0]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def variables(environ: Mapping[str, str], prefix: str, keys: frozenset[str] | None) -> dict[str, object]:
    """Values of the variables `PREFIX_KEY`, of `keys` or all, by key in lower case; an empty one counts as unset."""
    found = {name.removeprefix(prefix).lower(): environ[name] for name in sorted(environ) if name.startswith(prefix)}
    special = {name.removeprefix(prefix).lower() for name in _OTHER_VARIABLES}
    return {key: value for key, value in found.items() if value and key not in special and (keys is None or key in keys)}


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a mapping that has a key twice, of which YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:  # noqa: FBT001, FBT002
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"the key {key.value} is there twice", key.start_mark)
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Mapping[Hashable, object]:
    """What the file holds.

    Raises:
        ConfigError: It can't be read, or is no YAML mapping.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} isn't UTF-8 text: byte {error.start} is wrong") from error
    try:
        values = yaml.load(text, _UniqueKeyLoader)  # noqa: S506  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        place = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path} isn't valid YAML: {error.problem}{place}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path} isn't valid YAML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{path} isn't valid YAML: it is nested too deeply") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values, as `chunk_size: 256`")
    return values
