"""One frozen, flat configuration of a run: load, merge, validate.

The keys are those of `Settings` and the keyword-only parameters of the chosen model, optimizer, schedule and probes.
Values come in layers, later ones win: defaults, the experiment file, the sweep's trial or the command line.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model, model_validator

from cifar import registry
from cifar.errors import UserError, choices
from cifar.registry import Entry, Key

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"


def _switch(value: Any) -> Any:
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


class Settings(BaseModel):
    """The keys that every run has. The chosen parts add theirs."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=False)

    experiment: str = Field("", description="name of a file in experiments/, or a path: the values to start from")
    dataset: Literal["cifar10", "stand-in", "auto"] = Field(
        "cifar10", description="auto: CIFAR-10 where it can be had within 10 s, else the generated stand-in"
    )
    val_size: int = Field(5000, ge=0, le=45000, description="images cut from the training set for validation; 0: none")
    train_size: int = Field(0, ge=0, le=50000, description="train on the first N images after the cut only; 0: all")
    keep: float = Field(
        1.0, gt=0.0, le=1.0, description="share of the training images in an epoch: those whose loss was largest when last seen"
    )
    test: Literal["never", "final"] = Field("never", description="final: score the test set once, after the last epoch")
    model: str = Field("worksheet1", description="a name of `python -m cifar models`")
    optimizer: str = Field("adam", description="sgd, adam, adamw, muon, or a plug-in")
    schedule: str = Field("constant", description="how lr moves with progress: cosine, linear, onecycle, step, ...")
    probes: str = Field("all", description="instruments: all, none, or names separated by commas")
    epochs: int = Field(25, ge=1, description="passes over the training images")
    max_steps: int = Field(0, ge=0, description="end every epoch after N steps; 0: no limit (for trying things out)")
    batch_size: int = Field(128, ge=1, description="images a step")
    seed: int = Field(0, ge=0, lt=2**63, description="weights, order, augmentation; the validation cut's own is fixed")
    flip: Literal["none", "random", "alternating"] = Field("random", description="horizontal flip of training images")
    crop: int = Field(4, ge=0, le=16, description="pixels of padding before a random 32x32 crop; 0: no crop")
    crop_padding: Literal["zero", "reflect"] = Field("zero", description="what the padding holds")
    cutout: int = Field(0, ge=0, le=32, description="side of the square that is blanked, in pixels; 0: none")
    normalize: Literal["half", "dataset"] = Field(
        "half", description="half: (x - 0.5) / 0.5 as in the worksheets; dataset: the training set's mean and std"
    )
    label_smoothing: float = Field(0.0, ge=0.0, lt=1.0, description="share of the target spread over all classes")
    mixup: float = Field(0.0, ge=0.0, description="alpha of mixup's Beta distribution; 0: off")
    cutmix: float = Field(0.0, ge=0.0, description="alpha of CutMix's Beta distribution; 0: off")
    ema: float = Field(0.0, ge=0.0, lt=1.0, description="decay a step of the averaged weights that are evaluated; 0: off")
    tta: Literal["none", "flip", "flip+shift"] = Field("none", description="views averaged at the test: 1, 2 or 6")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 on CUDA, fp32 elsewhere")
    channels_last: bool = Field(True, description="NHWC memory format for convolutions")
    deterministic: bool = Field(False, description="deterministic kernels on the GPU; on the CPU they always are")
    compile: Annotated[Literal["auto", "on", "max", "off"], BeforeValidator(_switch)] = Field(
        "auto", description="torch.compile the step; auto: on a GPU, where the work ahead pays for it; max: tune it for minutes"
    )
    capture: bool = Field(True, description="on a GPU, replay the step as a CUDA graph")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    threads: int = Field(0, ge=0, description="CPU threads of a trial; 0: torch's choice (a sweep fixes it)")
    probe_every: int = Field(50, ge=1, description="steps between two looks of the instruments")
    checkpoint_every: int = Field(0, ge=0, description="steps between two checkpoints; 0: about every 30 s")
    max_macs: float = Field(0.0, ge=0.0, description="skip the run if its model needs more MACs than this; 0: no limit")

    @model_validator(mode="after")
    def _together(self) -> Settings:
        if self.mixup and self.cutmix:
            raise ValueError("mixup and cutmix are alternatives; set one of them to 0")
        if self.keep < 1 and (self.mixup or self.cutmix):
            raise ValueError(
                "keep ranks images by their losses, and mixup and cutmix blend two in one; set keep to 1, or them to 0"
            )
        if self.train_size > 50000 - self.val_size:
            raise ValueError(f"train_size is {self.train_size}, but only {50000 - self.val_size} images are left to train on")
        if self.batch_size > self.images:
            kept = f": keep {self.keep} leaves {self.images} an epoch" * (self.keep < 1)
            raise ValueError(f"batch_size {self.batch_size} is more than the images there are to train on{kept}")
        return self

    @property
    def images(self) -> int:
        """Training images of an epoch."""
        return round(self.keep * (self.train_size or 50000 - self.val_size))

    def part(self, kind: str) -> dict[str, Any]:
        """The keyword arguments of the chosen `model`, `optimizer`, `schedule`, or of one probe by its name."""
        entry = registry.probes[kind] if kind not in _CHOSEN else _CHOSEN[kind][getattr(self, kind)]
        return {name: getattr(self, name) for name in entry.keys}

    def flat(self) -> dict[str, Any]:
        """All keys and values, as JSON takes them."""
        return self.model_dump(mode="json")


_CHOSEN = {"model": registry.models, "optimizer": registry.optimizers, "schedule": registry.schedules}


def probe_names(chosen: str) -> list[str]:
    """`all`, `none` or `a,b` -> names of registered probes."""
    if chosen in ("all", "none"):
        return registry.probes.names() if chosen == "all" else []
    names = [registry.probes[name.strip()].name for name in chosen.split(",") if name.strip()]
    if len(set(names)) < len(names):
        raise UserError(f"probes = '{chosen}': a name stands there twice; once is enough")
    return names


def _chosen(values: Mapping[str, Any]) -> list[Entry]:
    """The entries that `values` choose, defaults filled in."""
    default = {name: field.default for name, field in Settings.model_fields.items()}
    picked = []
    for kind, known in _CHOSEN.items():
        name = values.get(kind, default[kind])
        if not isinstance(name, str):
            raise UserError(f"{kind}: expected a name, got {name!r}")
        picked.append(known[name])
    names = values.get("probes", default["probes"])
    if not isinstance(names, str):
        raise UserError(f"probes: expected 'all', 'none' or names separated by commas, got {names!r}")
    return picked + [registry.probes[name] for name in probe_names(names)]


def keys_of(entries: Iterable[Entry]) -> dict[str, Key]:
    """The keys that `entries` take. One key with two types, or one that is a setting too, is an error."""
    keys: dict[str, Key] = {}
    for entry in entries:
        for key in entry.keys.values():
            if key.name in Settings.model_fields:
                raise UserError(f"{key.file}: '{key.name}' is a setting of every run already; rename the parameter")
            known = keys.setdefault(key.name, key)
            if _plain(known.type) != _plain(key.type):
                raise UserError(f"'{key.name}' has one type in {known.file} and another in {key.file}; rename one")
    return keys


def _plain(annotation: Any) -> Any:
    return getattr(annotation, "__origin__", annotation) if hasattr(annotation, "__metadata__") else annotation


def every_key() -> dict[str, Key]:
    """The keys of all registered parts, checked for conflicts."""
    return keys_of([*registry.models, *registry.optimizers, *registry.schedules, *registry.probes])


def _whole(value: Any) -> Any:
    # W&B's server and JSON turn 128 into 128.0: a whole float is a valid int.
    return int(value) if isinstance(value, float) and value.is_integer() else value


@functools.lru_cache(maxsize=256)
def _schema(model: str, optimizer: str, schedule: str, probes: str) -> type[Settings]:
    entries = _chosen({"model": model, "optimizer": optimizer, "schedule": schedule, "probes": probes})
    fields: dict[str, Any] = {name: (field.annotation, field) for name, field in Settings.model_fields.items()}
    defaults = {key.name: key.default for entry in reversed(entries) for key in entry.keys.values()}
    for key in keys_of(entries).values():
        fields[key.name] = (key.type, Field(defaults[key.name], description=f"of {Path(key.file).stem}"))
    for name, (annotation, field) in fields.items():
        if _plain(annotation) is int:
            fields[name] = (Annotated[annotation, BeforeValidator(_whole)], field)
    return create_model("Config", __base__=Settings, **fields)


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Flat values of all layers, later ones win. The file that the key `experiment` names comes first."""
    merged: dict[str, Any] = {}
    for layer in layers:
        merged.update(flatten(layer))
    name = merged.get("experiment")
    return {**load(name), **merged} if name else merged


def flatten(values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Nested mappings become leaf names. Two leaves of one name with different values are an error."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        inner = flatten(value, f"{where}{name}.") if isinstance(value, Mapping) else {str(name): value}
        for leaf, leaf_value in inner.items():
            if leaf in flat and flat[leaf] != leaf_value:
                raise UserError(f"'{leaf}' is set twice ({flat[leaf]!r} and {leaf_value!r}); keep one of them")
            flat[leaf] = leaf_value
    return flat


def resolve(*layers: Mapping[str, Any]) -> Settings:
    """Layers of values -> one validated, frozen configuration. Raises UserError with what to do."""
    values = merge(*layers)
    if registry.plugin_directories():
        every_key()  # a plug-in's key that has another type elsewhere is said now, not by the sweep that mixes the two
    entries = _chosen(values)
    _reject_unknown(values, entries)
    schema = _schema(*(entry.name for entry in entries[:3]), values.get("probes", Settings.model_fields["probes"].default))
    try:
        return schema(**values)
    except ValidationError as error:
        raise UserError(_sentence(error)) from None


def _reject_unknown(values: Mapping[str, Any], entries: list[Entry]) -> None:
    taken = {*Settings.model_fields, *keys_of(entries)}
    for name in values:
        if name in taken:
            continue
        owners = [e for known in _CHOSEN.values() for e in known if name in e.keys]
        if owners:
            kind = owners[0].kind
            chosen = next(entry for entry in entries if entry.kind == kind)
            raise UserError(
                f"{kind} '{chosen.name}' does not take '{name}' (it takes: {', '.join(chosen.keys) or 'no keys'}; "
                f"'{name}' belongs to {', '.join(sorted({e.name for e in owners})[:6])}); in a sweep, give keys of one "
                f"{kind} together: {kind}: {{values: [{{{kind}: {owners[0].name}, {name}: ...}}, {{{kind}: {chosen.name}}}]}}"
            )
        raise UserError(f"unknown key '{name}': {choices(name, taken)}")


_WRITE = {"bool_type": "write true or false", "int_type": "write a whole number", "float_type": "write a number"}


def _sentence(error: ValidationError) -> str:
    parts = []
    for problem in error.errors():
        name = ".".join(str(p) for p in problem["loc"][:1])
        message = _WRITE.get(problem["type"], problem["msg"].removeprefix("Value error, "))
        parts.append(f"{name} = {problem['input']!r}: {message[0].lower()}{message[1:]}" if name else message)
    return "; ".join(parts)


def explain(layers: Iterable[tuple[str, Mapping[str, Any]]]) -> list[tuple[str, Any, str, str]]:
    """(key, value, where it came from, what it means) of every key, settings first."""
    layers = [(origin, flatten(values)) for origin, values in layers]
    config = resolve(*(values for _, values in layers))
    if config.experiment:
        layers.insert(0, (str(experiment_path(config.experiment)), load(config.experiment)))
    rows = []
    for name, field in type(config).model_fields.items():
        origin = next((origin for origin, values in reversed(layers) if name in values), "default")
        rows.append((name, getattr(config, name), origin, field.description or ""))
    return rows


_FREE = {"experiment", "seed", "epochs", "schedule", "test", "tta", "max_macs", "checkpoint_every", "label_smoothing"}


def form(config: Settings) -> dict[str, Any]:
    """What two runs have in common whose parts one can take over from the other.

    Of an optimizer's keys those that are scalars may differ, but not between zero and something: that is another rule.
    """
    optimizer = config.part("optimizer")
    scalars = {key: bool(value) for key, value in optimizer.items() if type(value) is float}
    free = _FREE | scalars.keys() | config.part("schedule").keys()
    fixed = {key: value for key, value in config.flat().items() if key not in free}
    return fixed | {"smoothed": bool(config.label_smoothing), "scalars": scalars}


# -- YAML --------------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: PyYAML's 1.1 reads `1e-5` as a string and `on`, `yes` as booleans."""


_REPLACED = ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float", "tag:yaml.org,2002:int")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag not in _REPLACED]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9]\d*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"),
    list("-+0123456789."),
)


def _no_duplicates(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key '{key}' stands twice", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _no_duplicates)


def parse_yaml(text: str, where: str) -> Any:
    """YAML text -> Python values; `where` names the source in the error."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{where}{at}: not valid YAML ({getattr(error, 'problem', None) or error}); correct the file") from None


def read_yaml(path: Path) -> Any:
    """A YAML file's content. Raises UserError where it cannot be read or parsed."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} ({getattr(error, 'strerror', None) or 'not text'}); check the path") from None
    return parse_yaml(text, str(path))


def experiment_path(name: str) -> Path:
    """`worksheet1` -> experiments/worksheet1.yaml; a path stays a path."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else EXPERIMENTS / f"{name}.yaml"
    if not path.exists():
        raise UserError(f"unknown experiment '{name}': {choices(name, (p.stem for p in EXPERIMENTS.glob('*.yaml')))}")
    return path


def load(name: str) -> dict[str, Any]:
    """The flat values of an experiment, by name or path."""
    path = experiment_path(name)
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: an experiment is a mapping of keys to values")
    if "experiment" in values:
        raise UserError(f"{path}: an experiment cannot start from another one; copy its values")
    return flatten(values)


def parse_pairs(pairs: Iterable[str]) -> dict[str, Any]:
    """`["lr=1e-3", "model=resnet20"]` -> {"lr": 0.001, "model": "resnet20"}; values are read as YAML."""
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise UserError(f"'{pair}': write key=value, for example lr=0.1")
        values[name.strip().removeprefix("--").replace("-", "_")] = parse_yaml(text, f"the value of {name}")
    return values
