"""A backbone's tensors under timm's, torchvision's, the HRNet family's or the released names.

ResNets have the same names in timm, torchvision and the paper's released code, and HRNet-W32
the same in timm and in its own family. MobileNetV2 has three namings, listed here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from posefabric.structures import PosefabricError

# Blocks of each of timm's stages; the others number the blocks through, from 1.
MOBILENET_STAGES = (1, 2, 3, 4, 3, 3, 1)
# A block's expansion, depthwise and projecting convolution, each with its norm; the first block
# of all has no expansion.
TIMM = ("conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3")
TIMM_FIRST = ("conv_dw", "bn1", "conv_pw", "bn2")
TORCHVISION = ("0.0", "0.1", "1.0", "1.1", "2", "3")
TORCHVISION_FIRST = ("0.0", "0.1", "1", "2")
RELEASED = ("0", "1", "3", "4", "6", "7")
RELEASED_FIRST = ("0", "1", "3", "4")


@dataclass(frozen=True)
class Naming:
    """``names`` maps a backbone's own tensor names to those of a file."""

    label: str
    names: Mapping[str, str]


def mobilenet_v2_modules() -> dict[str, list[str]]:
    """MobileNetV2's convolutions and norms in order of computation, by naming."""
    timm, torchvision = ["conv_stem", "bn1"], ["features.0.0", "features.0.1"]
    released = list(torchvision)
    number = 0
    for stage, count in enumerate(MOBILENET_STAGES):
        for block in range(count):
            number += 1
            first = number == 1
            timm += [f"blocks.{stage}.{block}.{x}" for x in (TIMM_FIRST if first else TIMM)]
            start = f"features.{number}.conv"
            torchvision += [f"{start}.{x}" for x in (TORCHVISION_FIRST if first else TORCHVISION)]
            released += [f"{start}.{x}" for x in (RELEASED_FIRST if first else RELEASED)]
    return {"timm's": timm, "torchvision's": torchvision, "the released code's": released}


def namings(wanted: Collection[str], *, own: str) -> list[Naming]:
    """The namings in which a backbone with the tensors ``wanted`` may be found, its own first.

    ``own`` is the label of its own names.
    """
    found = [Naming(own, {name: name for name in wanted})]
    modules = mobilenet_v2_modules()
    for ours in modules.values():
        if not all(name.rpartition(".")[0] in ours for name in wanted):
            continue
        for label, theirs in modules.items():
            places = dict(zip(ours, theirs, strict=True))
            if theirs == ours:
                continue
            names = {}
            for name in wanted:
                module, _, tensor = name.rpartition(".")
                names[name] = f"{places[module]}.{tensor}"
            found.append(Naming(label, names))
        break
    return found


def find_tensors(
    wanted: Collection[str], state: Mapping[str, Tensor], *, own: str, origin: str
) -> dict[str, Tensor]:
    """The tensors of a state dict by a backbone's own names; others may be there and are left.

    Raises PosefabricError that says which naming was looked for and the first missing tensor.
    """
    # timm's features_only wrapper joins the first levels of a name by underscores.
    given = {name.replace(".", "_"): value for name, value in state.items()}
    candidates = namings(wanted, own=own)
    missing = {
        naming.label: [
            name for name in naming.names.values() if name.replace(".", "_") not in given
        ]
        for naming in candidates
    }
    best = min(candidates, key=lambda naming: len(missing[naming.label]))
    lacking = missing[best.label]
    if len(lacking) == len(wanted):
        labels = " nor ".join(naming.label for naming in candidates)
        raise PosefabricError(
            f"{origin}: none of the backbone's {len(wanted)} tensors is there under {labels} "
            f"names, the first missing is {lacking[0]}; the file has "
            f"{', '.join(list(state)[:3])}, ...; give weights of this model"
        )
    if lacking:
        raise PosefabricError(
            f"{origin}: {len(lacking)} of the backbone's {len(wanted)} tensors are missing, looked "
            f"for under {best.label} names; the first is {lacking[0]}; give weights of this model"
        )
    return {ours: given[theirs.replace(".", "_")] for ours, theirs in best.names.items()}
