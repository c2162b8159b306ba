"""Whether a checkpoint of the authors' released code fits a store: one check and one error per difference."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from satdifuser.errors import RunError
from satdifuser.fuse.inputs import named_inputs
from satdifuser.fuse.reference_file import ReferenceCheckpoint, ReferenceConfig
from satdifuser.fuse.settings import Task
from satdifuser.store.reader import FeatureStore
from satdifuser.store.schema import Attributes

TASKS: dict[str, Task] = {
    "classification": "classification",
    "multi_label_classification": "multilabel",
    "segmentation": "segmentation",
}
DIFFUSIONSAT_SCHEDULE = {"num_train_timesteps": 1000, "steps_offset": 1}
SHOWN_PROBLEMS = 5


def check_store(checkpoint: ReferenceCheckpoint, store: FeatureStore) -> list[str]:
    """Compare a checkpoint with a store in task, classes, timesteps and layers.

    Returns:
        Notes on what could not be compared, or differs without keeping the network from running.

    Raises:
        StoreError: shards are missing.
        RunError: they do not fit.
    """
    store.require_complete()
    config, a = checkpoint.config, store.attributes
    if TASKS[config.task] != a.task:
        raise RunError(
            f"{checkpoint.path}: was trained for {TASKS[config.task]}, but {store.path} holds "
            f"{f'targets for {a.task}' if a.task else 'no targets'}; name a store of its task"
        )
    check_classes(checkpoint, store)
    check_timesteps(checkpoint, store)
    check_layers(checkpoint, store)
    check_widths(checkpoint, store)
    unnamed = [] if config.class_names else ["it names no classes: they are taken to be in the store's order"]
    return unnamed + compare_features(config, a)


def check_classes(checkpoint: ReferenceCheckpoint, store: FeatureStore) -> None:
    """Refuse a store with more or fewer classes, or with others or in another order where names are known."""
    config, classes, where = checkpoint.config, store.attributes.classes, store.path
    if config.num_classes != len(classes):
        raise RunError(
            f"{checkpoint.path}: tells {config.num_classes} classes apart, but {where} holds {len(classes)}: "
            f"{', '.join(classes)}; name a store of its classes"
        )
    if config.class_names and list(map(letters, config.class_names)) != list(map(letters, classes)):
        raise RunError(
            f"{checkpoint.path}: its classes are {', '.join(config.class_names)}, but those of {where} are "
            f"{', '.join(classes)}; name a store with the same classes in the same order"
        )


def letters(name: str) -> str:
    """A class name without case, spaces and punctuation."""
    return re.sub(r"[\W_]+", "", name).casefold()


def check_timesteps(checkpoint: ReferenceCheckpoint, store: FeatureStore) -> None:
    """Refuse a store of other timesteps than those that the checkpoint's saved steps stand for."""
    config, a = checkpoint.config, store.attributes
    schedule = DIFFUSIONSAT_SCHEDULE | a.feature_identity.get("scheduler", {})
    timesteps = config.timesteps(schedule["num_train_timesteps"], schedule["steps_offset"])
    if timesteps != a.timesteps:
        raise RunError(
            f"{checkpoint.path}: was trained on timesteps {timesteps} (saved steps {config.save_timesteps} "
            f"of {config.num_timesteps}), but {store.path} holds {a.timesteps}; extract with "
            f"extract.timesteps: {timesteps}"
        )


def check_layers(checkpoint: ReferenceCheckpoint, store: FeatureStore) -> None:
    """Refuse a store with layers that the checkpoint did not read, or read in another order."""
    selection = checkpoint.config.layer_idxs
    ours = sorted(store.attributes.layers, key=lambda layer: layer.stride)
    places = {layer.name: find_place(layer.name, selection) for layer in ours}
    reads = f"{checkpoint.path}: reads the layers {', '.join(patterns(selection))}"
    strays = [name for name, place in places.items() if place is None]
    if strays:
        raise RunError(
            f"{reads}, but {store.path} also holds {shorten(strays)}; extract with extract.layers: "
            f"[{', '.join(patterns(selection))}]"
        )
    if sorted(ours, key=lambda layer: (layer.stride, places[layer.name])) != ours:
        raise RunError(
            f"{reads} of a block in this order, but stores hold attn1 before conv2; such a checkpoint cannot "
            "be imported"
        )


def patterns(selection: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The script's selection of layers as ours, indices left aside."""
    return [f"{block}.*.{module}" for block, modules in selection.items() for module in modules]


def find_place(name: str, selection: Mapping[str, Mapping[str, Any]]) -> tuple[int, int, int] | None:
    """Place of a U-Net module in the script's order (list of blocks, block, kind); None if it is left out."""
    blocks, _, rest = name.partition(".")
    index = rest.split(".")[0]
    kinds = [order for order, module in enumerate(selection.get(blocks, {})) if name.endswith(module)]
    if not kinds:
        return None
    return list(selection).index(blocks), int(index) if index.isdecimal() else 0, kinds[0]


def check_widths(checkpoint: ReferenceCheckpoint, store: FeatureStore) -> None:
    """Refuse a store whose layers, or for the mixture of experts scales, are not as many and as wide."""
    channels, state = named_inputs(store, None, ["*"]).channels, checkpoint.state
    if checkpoint.config.fuser == "moe":
        what, found = "scales", read_widths(state, "scale_moes", "gate_network.0.weight")
        expected = [sum(channels[stride]) for stride in sorted(channels)]
    else:
        what, found = "layers", read_widths(state, "bottleneck_layers", "0.conv1.weight")
        expected = [width for stride in sorted(channels) for width in channels[stride]]
    # a width of None is that of a missing tensor, which is named later
    if len(found) != len(expected) or any(f not in (None, e) for f, e in zip(found, expected, strict=True)):
        raise RunError(
            f"{checkpoint.path}: reads {len(found)} {what} of {found} channels, fine to coarse, but "
            f"{store.path} holds {len(expected)} of {expected}; extract with its backbone and "
            f"extract.layers: [{', '.join(patterns(checkpoint.config.layer_idxs))}]"
        )


def read_widths(state: Mapping[str, Tensor], modules: str, tensor: str) -> list[int | None]:
    """Input channels of each module of a list in a state dict; None where the tensor is missing."""
    count = len({name.split(".")[1] for name in state if name.startswith(f"{modules}.")})
    shapes = [state[name].shape if (name := f"{modules}.{i}.{tensor}") in state else () for i in range(count)]
    return [shape[1] if len(shape) > 1 else None for shape in shapes]


def check_tensors(checkpoint: ReferenceCheckpoint, expected: Mapping[str, Tensor]) -> None:
    """Refuse weights of other names or shapes than those of the network that its config describes."""
    found = checkpoint.state
    problems = [f"lacks {name}" for name in expected if name not in found]
    problems += [f"holds unknown {name}" for name in found if name not in expected]
    problems += [
        f"{name} is {list(found[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if problems:
        raise RunError(
            f"{checkpoint.path}: decoder_net is not what its config describes: {shorten(problems)}; expected "
            "weights and settings of one training"
        )


def shorten(texts: Sequence[str]) -> str:
    """Join the first few texts."""
    more = len(texts) - SHOWN_PROBLEMS
    return ", ".join(texts[:SHOWN_PROBLEMS]) + (f" and {more} more" if more > 0 else "")


def compare_features(config: ReferenceConfig, attributes: Attributes) -> list[str]:
    """Notes on settings of a store that differ from how the script made the features it trained on."""
    extract, backbone = (attributes.settings.get(section, {}) for section in ("extract", "backbone"))
    inverts = config.diffusion_mode == "inversion"
    prediction = extract.get("prediction")
    if prediction == "scheduler":
        prediction = attributes.feature_identity.get("scheduler", {}).get("prediction_type")
    pairs = {
        "extract.noising": ("inversion" if inverts else "forward", extract.get("noising")),
        "extract.steps": (config.num_timesteps if inverts else None, extract.get("steps")),
        "extract.latent": ("sample", extract.get("latent")),
        "extract.prediction": ("epsilon", prediction),
        "extract.image_size": (config.img_size and [config.img_size] * 2, extract.get("image_size")),
        "backbone.prompt": (config.prompt, backbone.get("prompt")),
    }
    return [
        f"{name}: the script made its features with {theirs!r}, the store's were made with {ours!r}"
        for name, (theirs, ours) in pairs.items()
        if None not in (theirs, ours) and theirs != ours
    ]
