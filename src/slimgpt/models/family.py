"""Layouts of the model families.

A family is one JSON file in the folder ``families``; a new family needs no code. A block is a list
of sublayers. Each sublayer reads the residual stream through a norm, has input projections and one
output projection, and adds its output to the stream. Its units (key/value groups or channels) own
rows of the input projections and columns of the output projection.
"""

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from slimgpt.errors import UnsupportedModelError

PRUNED_PREFIX = "slimgpt_"

# Model types with a text model of one of the families inside, beside a vision tower.
WRAPPER_TYPES = (
    "aya_vision",
    "cohere2_vision",
    "gemma3",
    "idefics3",
    "internvl",
    "llava",
    "llava_next",
    "llava_onevision",
    "mistral3",
    "paligemma",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_5",
    "qwen3_vl",
    "smolvlm",
)

# Versions of transformers with which all model types were tested, oldest and newest.
TESTED_VERSIONS = ("5.16.0", "5.23.0")

# Of these, the types that have another form in the oldest, where they are refused.
NEWEST_ONLY = ("granitemoe",)

# What rows of a projection belong to: all query heads, key/value groups, channels or experts.
Segment = Literal["head", "group", "channel", "expert"]


class SublayerSpec(BaseModel):
    """Names of a sublayer's modules inside its block, and its config keys.

    Attributes
    ----------
    kind : {"attention", "ffn", "experts"}
        Kind of sublayer.
    norm, post_norm : tuple of str
        The norm before the sublayer, and the one after it: of these, the first that the block has.
    module : str
        The sublayer itself; empty if its layers belong to the block.
    chain : tuple of str
        Modules that are applied one after the other, where `module` cannot be called by itself.
    inputs : mapping of str to tuple
        Linear layers of the module that lose rows, with the segments of their rows from top to
        bottom, see `slimgpt.models.units.unit_rows`.
    interleaved : bool
        Whether the rows of the inputs go group by group: the segments repeat for each.
    vectors : mapping of str to tuple
        Norms of the module whose weights shrink with the units; some models lack them.
    couples_units : bool
        Whether one of these norms is over all heads, so that each head depends on the others.
    output : str
        The linear layer that loses columns.
    widths : mapping of str to str
        Config keys of the number of units, then of what else scales with them, or of the channels
        of each expert. Query heads without a number of groups share one. Without any, the
        sublayer cannot be pruned.
    rebuilt : bool
        Whether the stock class cannot build the attention with fewer heads, so that the modelling
        file of the result does. With ``--uniform`` it stays whole then.
    reason : str
        Why the sublayer, or a part of it, cannot be pruned.
    bias : str or bool
        Config key that gives these linear layers biases, or whether they have them in all models.
    layer_type : str or None
        If given, only layers of this type have the sublayer: those of ``layer_types`` in the
        config; or ``sparse``, layers with experts, and ``dense``, the others.
    when : mapping of str to bool
        Only models whose config has these switches on or off have the sublayer.
    router : str
        The module that chooses the experts of each token.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["attention", "ffn", "experts"]
    norm: tuple[str, ...] = ()
    post_norm: tuple[str, ...] = ()
    module: str
    chain: tuple[str, ...] = ()
    inputs: Mapping[str, tuple[Segment, ...]] = {}
    interleaved: bool = False
    vectors: Mapping[str, tuple[Segment, ...]] = {}
    couples_units: bool = False
    output: str
    widths: Mapping[Segment, str] = {}
    rebuilt: bool = False
    reason: str = ""
    bias: str | bool
    layer_type: str | None = None
    when: Mapping[str, bool] = {}
    router: str = ""

    def counts(self, config: Any) -> dict[str, int]:
        """Number of units, and of what scales with them, in a layer with this config.

        Query heads without groups share one.
        """
        counts = {kind: getattr(config, key) for kind, key in self.widths.items()}
        return {"group": 1} | counts if "head" in counts else counts


class Family(BaseModel):
    """The content of a family's JSON file.

    Attributes
    ----------
    model_types : tuple of str
        Values of ``model_type`` in the config.
    real_weights : mapping of str to str
        Model types of which a model with real weights is among the tests, and that model. The
        others are tested with random weights.
    decoder, blocks : str
        Path of the decoder in the causal language model, and of its list of blocks in the decoder.
    sublayers : tuple of SublayerSpec
        In the order of computation.
    parallel : bool or str
        Whether all sublayers read the input of the block; or the config key that says so.
    multiplier : str or None
        Config key of the factor by which each sublayer's output is multiplied.
    returns_tuple : bool
        Whether a block returns its hidden states inside a tuple.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_types: tuple[str, ...]
    real_weights: Mapping[str, str] = {}
    decoder: str
    blocks: str
    sublayers: tuple[SublayerSpec, ...]
    parallel: bool | str = False
    multiplier: str | None = None
    returns_tuple: bool = False

    @property
    def units(self) -> list[str]:
        """Names of the units that can be pruned; heads that are groups too are heads."""
        names = {"group": "groups", "head": "heads", "channel": "channels", "expert": "experts"}
        found = {}
        for spec in self.sublayers:
            if spec.layer_type != "dense":
                kinds = {key: kind for kind, key in spec.widths.items()}.values()
                hidden = {"head"} if spec.couples_units else set()
                found |= {names[kind]: None for kind in kinds if kind not in hidden}
        return list(found)

    @property
    def rebuilds_attention(self) -> bool:
        """Whether attention with fewer heads needs the modelling file of the result."""
        return any(spec.rebuilt for spec in self.sublayers)

    @property
    def reasons(self) -> list[str]:
        """Say what cannot be pruned, and why."""
        return [f"{_what_stays(spec)}: {spec.reason}" for spec in self.sublayers if spec.reason]

    def layer(self, config: Any, index: int) -> list[SublayerSpec]:
        """List the sublayers of one block of a model with this config."""
        return [
            spec
            for spec in self.sublayers
            if spec.layer_type in (None, *_layer_types(config, index))
            and all(bool(getattr(config, key)) == on for key, on in spec.when.items())
        ]

    def prunable_attention(self, config: Any) -> tuple[int, SublayerSpec] | None:
        """Find the first layer whose attention can be pruned: its index, and the attention."""
        for index in range(config.num_hidden_layers):
            for spec in self.layer(config, index):
                if spec.kind == "attention" and spec.widths:
                    return index, spec
        return None

    def widths(self, kind: str) -> list[str]:
        """Config keys of the widths of a kind of sublayer; empty if it cannot be pruned."""
        return [key for spec in self.sublayers if spec.kind == kind for key in spec.widths.values()]

    def is_parallel(self, config: Any) -> bool:
        """Whether all sublayers of a block read the input of the block."""
        key = self.parallel
        return key if isinstance(key, bool) else bool(getattr(config, key))


def _what_stays(spec: SublayerSpec) -> str:
    return f"channels of {spec.kind}" if spec.widths else spec.layer_type or spec.kind


def _layer_types(config: Any, index: int) -> list[str]:
    """Types of a layer, by the keys with which configs describe them."""
    types = (getattr(config, "layer_types", None) or [""] * (index + 1))[index]
    is_sparse = (
        index >= (getattr(config, "first_k_dense_replace", None) or 0)
        and index not in (getattr(config, "mlp_only_layers", None) or ())
        and (index + 1) % (getattr(config, "decoder_sparse_step", None) or 1) == 0
    )
    return [types, "sparse" if is_sparse else "dense"]


@cache
def load_families() -> dict[str, Family]:
    """Load all families, by model type."""
    texts = (
        path.read_text(encoding="utf-8")
        for path in files("slimgpt.models").joinpath("families").iterdir()
        if path.name.endswith(".json")
    )
    found = [Family.model_validate_json(text) for text in texts]
    return {model_type: family for family in found for model_type in family.model_types}


@cache
def load_unsupported() -> dict[str, list[str]]:
    """Load the model types that cannot be pruned, by reason; others are just not described."""
    file = files("slimgpt.models").joinpath("unsupported.json")
    return json.loads(file.read_text(encoding="utf-8"))


def family_of(model_type: str) -> Family:
    """Find the family of a model type; pruned types belong to the family of the original type.

    Raises
    ------
    UnsupportedModelError
        If no family has this model type, with the reason if it is known. The hint lists the
        supported types.
    """
    families = load_families()
    family = families.get(model_type.removeprefix(PRUNED_PREFIX))
    if family is None:
        unsupported = load_unsupported().items()
        reasons = [f": {reason}" for reason, types in unsupported if model_type in types]
        raise UnsupportedModelError(
            f"models of type {model_type!r} are not supported{''.join(reasons)}",
            hint=f"supported model types: {', '.join([*sorted(families), *WRAPPER_TYPES])}",
        )
    return family
