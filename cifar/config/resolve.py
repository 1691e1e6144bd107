"""From layers of values to one validated, frozen configuration of a run.

The keys are those of `Settings` and the keyword-only parameters of the chosen model, optimizer, schedule and probes.
Values come in layers, and later ones win: defaults, the experiment file, the sweep's trial or the command line.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PydanticUserError, TypeAdapter, ValidationError, create_model
from pydantic_core import PydanticSerializationError

from cifar import registry
from cifar.config.schema import PART_REGISTRIES, Settings
from cifar.config.shipped import find_shipped, shipped_names, strip_to_name
from cifar.config.yaml_loader import parse_yaml, read_yaml
from cifar.errors import UserError, did_you_mean
from cifar.registry import Entry, Key
from cifar.system.files import MAX_DEPTH, MAX_SHOWN, shorten_repr
from cifar.system.names import escape_controls

ExperimentReader = Callable[[str], Mapping[str, Any]]  # the name of an experiment -> its flat values

# -- from layers to a configuration ------------------------------------------------------------------------------------


def resolve_config(*layers: Mapping[str, Any], read_experiment: ExperimentReader | None = None) -> Settings:
    """Layers of values -> one validated, frozen configuration. Raises UserError with what to do.

    read_experiment: instead of `load_experiment`, for a caller that resolves thousands and reads each file once.
    """
    values = merge_layers(*layers, read_experiment=read_experiment)
    if registry.plugin_directories():
        collect_all_keys()  # raises where a key of a plug-in has another type elsewhere: now, not in a sweep that mixes the two
    entries = _select_entries(values)
    _reject_unknown(values, entries)
    schema = _build_schema(
        *(entry.name for entry in entries[:3]), values.get("probes", Settings.model_fields["probes"].default)
    )
    return _validate(schema, values)


@contextlib.contextmanager
def name_lost_plugin(run_id: str, plugins: Any) -> Iterator[None]:
    """Where a part of a recorded run is not known any more, say which file the run had it from.

    plugins: run.json's "plugins", which runs of earlier versions lack.
    """
    try:
        yield
    except registry.UnknownNameError as error:
        about = plugins.get(error.kind) if isinstance(plugins, Mapping) else None
        if not isinstance(about, Mapping) or about.get("name") != error.name or not isinstance(about.get("file"), str):
            raise
        file = about["file"]
        why = "which CIFAR_PLUGINS does not name now" if os.path.isfile(file) else "which is gone; restore it"
        raise UserError(
            f"unknown {error.kind} '{error.name}': run {run_id} had it from {file}, {why}; "
            f"set CIFAR_PLUGINS to {os.path.dirname(os.path.dirname(file))}"
        ) from None


def resolve_for_evaluation(values: Mapping[str, Any]) -> Settings:
    """The configuration of a recorded run, as far as its network and its images need it.

    The optimizer, the schedule and the probes are the defaults, or none: those of the run may be plug-ins that are gone.
    """
    entry = registry.models[str(values.get("model", Settings.model_fields["model"].default))]
    unneeded = {"experiment", "optimizer", "schedule", "probes", "teacher"}
    kept = {key: value for key, value in values.items() if key in {*Settings.model_fields, *entry.keys} - unneeded}
    default = {kind: Settings.model_fields[kind].default for kind in ("optimizer", "schedule")}
    schema = _build_schema(entry.name, default["optimizer"], default["schedule"], "none")
    return _validate(schema, {**kept, "probes": "none"})


def resolve_resumed(values: Mapping[str, Any]) -> tuple[Settings, list[str]]:
    """The configuration of a recorded run that goes on, and sentences about what is not here any more.

    Probes may be gone, and keys of parts: a probe changes nothing in a training.
    """
    kept = dict(values)
    kept["probes"], gone = keep_present_probes(str(kept.get("probes", "all")))
    notes = [f"the run's probe '{name}' is not here any more; the run goes on without what it measures" for name in gone]
    entries = _select_entries(kept)
    taken = {*Settings.model_fields, *collect_keys(entries)}
    if unknown := [key for key in kept if key not in taken]:
        notes.append(f"no part that is here takes {', '.join(map(repr, unknown))} of the run any more; left out")
    schema = _build_schema(*(entry.name for entry in entries[:3]), kept.get("probes", "all"))
    return _validate(schema, {key: value for key, value in kept.items() if key in taken}), notes


def keep_present_probes(chosen: str) -> tuple[str, list[str]]:
    """The key `probes` of a recorded run without those that are not here any more, and the names of these."""
    if chosen in ("all", "none"):
        return chosen, []
    names = [name.strip() for name in chosen.split(",") if name.strip()]
    present = [name for name in names if registry.probes.find(name)]
    return ",".join(present) or "none", [name for name in names if name not in present]


def _validate(schema: type[Settings], values: Mapping[str, Any]) -> Settings:
    try:
        return schema(**values)
    except ValidationError as error:
        raise UserError(_describe_errors(error)) from None


def merge_layers(*layers: Mapping[str, Any], read_experiment: ExperimentReader | None = None) -> dict[str, Any]:
    """Flat values of all layers, later ones win. The file that the key `experiment` names comes first."""
    merged: dict[str, Any] = {}
    for layer in layers:
        merged.update(flatten_values(layer))
    name = merged.get("experiment")
    if name and not isinstance(name, str):
        raise UserError(f"experiment: expected a name or a path, got {shorten_repr(name)}")
    return {**(read_experiment or load_experiment)(name), **merged} if name else merged


def flatten_values(values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Nested mappings become leaf names. Two leaves of one name with different values are an error."""
    if where.count(".") > MAX_DEPTH:
        raise UserError(f"'{where[:MAX_SHOWN]}...': mappings are nested too deeply; write the keys side by side")
    flat: dict[str, Any] = {}
    for name, value in values.items():
        inner = flatten_values(value, f"{where}{name}.") if isinstance(value, Mapping) else {str(name): value}
        for leaf, leaf_value in inner.items():
            if leaf in flat and flat[leaf] != leaf_value:
                raise UserError(
                    f"'{leaf}' is set twice ({shorten_repr(flat[leaf])} and {shorten_repr(leaf_value)}); keep one of them"
                )
            flat[leaf] = leaf_value
    return flat


_KEYS_NOT_IN_NAME = ("model", "dataset", "experiment")  # swept keys that a run's name does not repeat
_TYPE_ADVICE = {"bool_type": "write true or false", "int_type": "write a whole number", "float_type": "write a number"}


def format_name_value(value: Any) -> str:
    """A value as text for the name of a run or a trial: a float with four significant digits."""
    return f"{value:.4g}" if isinstance(value, float) else escape_controls(str(value))


def format_run_name(config: Mapping[str, Any], swept_keys: Iterable[str], name: str = "") -> str:
    """What a run is called: `name`, or its experiment or model and its values of the swept keys."""
    values = [f"{key}={format_name_value(config[key])}" for key in swept_keys if key in config and key not in _KEYS_NOT_IN_NAME]
    name = name or " ".join([str(config.get("experiment") or config.get("model")), *values])
    return ("stand-in " if config.get("dataset") == "stand-in" else "") + escape_controls(name)


def _describe_errors(error: ValidationError) -> str:
    parts = []
    for problem in error.errors():
        name = ".".join(str(p) for p in problem["loc"][:1])
        message = _TYPE_ADVICE.get(problem["type"], problem["msg"].removeprefix("Value error, "))
        parts.append(f"{name} = {shorten_repr(problem['input'])}: {message[0].lower()}{message[1:]}" if name else message)
    return "; ".join(parts)


def _reject_unknown(values: Mapping[str, Any], entries: list[Entry]) -> None:
    taken = {*Settings.model_fields, *collect_keys(entries)}
    for name in values:
        if name in taken:
            continue
        owners = [e for known in PART_REGISTRIES.values() for e in known if name in e.keys]
        if owners:
            kind = owners[0].kind
            chosen = next(entry for entry in entries if entry.kind == kind)
            raise UserError(
                f"{kind} '{chosen.name}' does not take '{name}' (it takes: {', '.join(chosen.keys) or 'no keys'}; "
                f"'{name}' belongs to {', '.join(sorted({e.name for e in owners})[:6])}); in a sweep, give keys of one "
                f"{kind} together: {kind}: {{values: [{{{kind}: {owners[0].name}, {name}: ...}}, {{{kind}: {chosen.name}}}]}}"
            )
        raise UserError(f"unknown key '{name}': {did_you_mean(name, taken)}")


def explain_config(layers: Iterable[tuple[str, Mapping[str, Any]]]) -> list[tuple[str, Any, str, str]]:
    """(key, value, where it came from, what it means) of every key, those of `Settings` first."""
    layers = [(origin, flatten_values(values)) for origin, values in layers]
    config = resolve_config(*(values for _, values in layers))
    if config.experiment:
        layers.insert(0, (str(find_experiment(config.experiment)), load_experiment(config.experiment)))
    rows = []
    for name, field in type(config).model_fields.items():
        origin = next((origin for origin, values in reversed(layers) if name in values), "default")
        rows.append((name, getattr(config, name), origin, field.description or ""))
    return rows


# -- the keys of the chosen parts --------------------------------------------------------------------------------------


def collect_keys(entries: Iterable[Entry]) -> dict[str, Key]:
    """The keys that `entries` take. Raises UserError for a key with two types, and for one that is also in `Settings`."""
    keys: dict[str, Key] = {}
    for entry in entries:
        for key in entry.keys.values():
            if key.name in Settings.model_fields:
                raise UserError(f"{key.file}: '{key.name}' is a setting of every run already; rename the parameter")
            if key.name.startswith("_") or hasattr(Settings, key.name):
                raise UserError(f"{key.file}: '{key.name}' is no name for a configuration key; rename the parameter")
            known = keys.setdefault(key.name, key)
            if _strip_annotated(known.type) != _strip_annotated(key.type):
                raise UserError(f"'{key.name}' has one type in {known.file} and another in {key.file}; rename one")
    return keys


def collect_all_keys() -> dict[str, Key]:
    """The keys of all registered parts, checked for conflicts."""
    return collect_keys([*registry.models, *registry.optimizers, *registry.schedules, *registry.probes])


def parse_probe_names(chosen: str) -> list[str]:
    """The key `probes` (`all`, `none` or `a,b`) -> names of registered probes. Raises UserError."""
    if chosen in ("all", "none"):
        return registry.probes.names() if chosen == "all" else []
    names = [registry.probes[name.strip()].name for name in chosen.split(",") if name.strip()]
    if len(set(names)) < len(names):
        raise UserError(f"probes = '{chosen}': a name stands there twice; once is enough")
    return names


def _select_entries(values: Mapping[str, Any]) -> list[Entry]:
    """The registered model, optimizer, schedule and probes that `values` choose, in this order. Missing ones: the defaults."""
    default = {name: field.default for name, field in Settings.model_fields.items()}
    selected = []
    for kind, known in PART_REGISTRIES.items():
        name = values.get(kind, default[kind])
        if not isinstance(name, str):
            raise UserError(f"{kind}: expected a name, got {shorten_repr(name)}")
        selected.append(known[name])
    names = values.get("probes", default["probes"])
    if not isinstance(names, str):
        raise UserError(f"probes: expected 'all', 'none' or names separated by commas, got {shorten_repr(names)}")
    return selected + [registry.probes[name] for name in parse_probe_names(names)]


@functools.lru_cache(maxsize=256)
def _build_schema(model: str, optimizer: str, schedule: str, probes: str) -> type[Settings]:
    entries = _select_entries({"model": model, "optimizer": optimizer, "schedule": schedule, "probes": probes})
    fields: dict[str, Any] = {name: (field.annotation, field) for name, field in Settings.model_fields.items()}
    defaults = {key.name: key.default for entry in reversed(entries) for key in entry.keys.values()}
    for key in collect_keys(entries).values():
        if registry.is_plugin_file(key.file):
            _check_key(key)
        fields[key.name] = (key.type, Field(defaults[key.name], description=f"of {Path(key.file).stem}"))
    for name, (annotation, field) in fields.items():
        if _strip_annotated(annotation) is int:
            fields[name] = (Annotated[annotation, BeforeValidator(_whole_float_to_int)], field)
    return create_model("Config", __base__=Settings, **fields)


def _check_key(key: Key) -> None:
    """Raises UserError for a key whose type or default cannot be written down in a configuration."""
    try:
        TypeAdapter(key.type).dump_python(key.default, mode="json", warnings=False)
    except (PydanticUserError, PydanticSerializationError) as error:
        raise UserError(
            f"{key.file}: the key '{key.name}' has a type or a default that no configuration file can hold "
            f"({str(error).splitlines()[0]}); use bool, int, float, str or Literal"
        ) from error


def _strip_annotated(annotation: Any) -> Any:
    return getattr(annotation, "__origin__", annotation) if hasattr(annotation, "__metadata__") else annotation


def _whole_float_to_int(value: Any) -> Any:
    """128.0 -> 128: W&B's server and JSON turn whole numbers into floats, so such a float is a valid int."""
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError("a whole number has to be less than 2**63")
    return value


# -- experiments and KEY=VALUE -----------------------------------------------------------------------------------------


def find_experiment(name: str) -> Path:
    """The file of an experiment: a path, or a name of `experiments/` (worksheet1 -> experiments/worksheet1.yaml)."""
    is_path = name.endswith((".yaml", ".yml")) and Path(name).exists()
    path = Path(name) if is_path else find_shipped("experiments", name)
    if path is None:
        known = did_you_mean(strip_to_name("experiments", name), shipped_names("experiments"))
        raise UserError(f"unknown experiment '{name}': {known}")
    return path


def load_experiment(name: str) -> dict[str, Any]:
    """The flat values of an experiment, by name or path."""
    path = find_experiment(name)
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: an experiment is a mapping of keys to values")
    if "experiment" in values:
        raise UserError(f"{path}: an experiment cannot start from another one; copy its values")
    return flatten_values(values)


def parse_pairs(pairs: Iterable[str]) -> dict[str, Any]:
    """`["lr=1e-3", "model=resnet20"]` -> {"lr": 0.001, "model": "resnet20"}; values are read as YAML."""
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise UserError(f"'{pair}': write key=value, for example lr=0.1")
        values[name.strip().removeprefix("--").replace("-", "_")] = parse_yaml(text, f"the value of {name}")
    return values


# -- runs that are alike -----------------------------------------------------------------------------------------------

_FREE_KEYS = {
    "experiment", "seed", "epochs", "schedule", "test", "tta", "tta_share", "max_macs", "checkpoint_every", "label_smoothing",
    "distill_weight", "distill_temperature",
}  # fmt: skip


def graph_signature(config: Settings) -> dict[str, Any]:
    """The values that two runs must share so that they can use one compiled or captured training step.

    The schedule and an optimizer's scalars may differ. But a scalar that is zero in one run must be zero in the other:
    the optimizer's rule leaves out the operations of a zero.
    """
    optimizer = config.kwargs_for("optimizer")
    scalars = {key: bool(value) for key, value in optimizer.items() if type(value) is float}
    free = _FREE_KEYS | scalars.keys() | config.kwargs_for("schedule").keys()
    fixed = {key: value for key, value in config.to_dict().items() if key not in free}
    return fixed | {"smoothed": bool(config.label_smoothing), "scalars": scalars}
