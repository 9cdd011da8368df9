"""What kind of file a checkpoint is whose keys do not fit: the one line that helps, in place of all names."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

from argenseg_jax.errors import brief

_LORA = re.compile(r"(^|\.)(lora_[A-Za-z_]+|base_layer|base_model)(\.|$)")
_QUANTISED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|SCB|absmax|quant_map|quant_state|weight_scale|"
    r"weight_scale_inv|weight_format)(\.|$)"
)
_MOST = 0.5  # share of the keys that have to be known without a prefix


def advice(keys: Collection[str], is_known: Callable[[str], bool]) -> str | None:
    """One line about keys of which some are unexpected; None where nothing better is known than to list them.

    Args:
      keys: all keys of the checkpoint.
      is_known: whether the weight map has a rule for a key.
    """
    if adapters := [key for key in keys if _LORA.search(key)]:
        return (
            f"{len(adapters)} of its {len(keys)} tensors belong to LoRA adapters that are not merged, such as "
            f"'{brief(adapters[0], 120)}': merge them into the weights first (peft: model.merge_and_unload(), "
            "then save_pretrained), and use the folder written then"
        )
    if quantised := [key for key in keys if _QUANTISED.search(key)]:
        return (
            f"its weights are quantised ('{brief(quantised[0], 120)}'): the weights in float16, bfloat16 or "
            "float32 are needed"
        )
    if prefix := _common_prefix(keys, is_known):
        return (
            f"all {len(keys)} keys begin with '{prefix}', as a wrapper around the model writes them: save the "
            f"state_dict of the model within, or cut '{prefix}' off the keys"
        )
    return None


def _common_prefix(keys: Collection[str], is_known: Callable[[str], bool]) -> str | None:
    """'module.' or the like, if all keys have it and most are known without it only."""
    first = next(iter(keys), "")[:1000]
    for dot in list(re.finditer(r"\.", first))[:4]:
        prefix = first[: dot.end()]
        if not all(key.startswith(prefix) for key in keys):
            return None
        bare = sum(is_known(key.removeprefix(prefix)) for key in keys)
        if bare > _MOST * len(keys) and bare > sum(map(is_known, keys)):
            return prefix
    return None
