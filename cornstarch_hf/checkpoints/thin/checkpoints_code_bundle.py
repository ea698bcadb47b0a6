"""The code of a checkpoint that saves itself again: the very files that are running."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...parts.classes import CODE_ENTRY
from ...parts.registries import CALLBACKS, PROJECTORS
from ..code_folder import HERE, INSTALL, ROOT, SIDES, read_entry, write_code


def export_code(
    folder: Any, side: str, owner: Any, target: Any, include_code: bool | None, others: Iterable[Any], references: bool
) -> set[str]:
    """Copy the running files beside a saved configuration, and name them in its ``auto_map``; ValueError where a part is
    defined elsewhere, or the other side of the checkpoint came with other code."""
    folder, target, classes = Path(folder), Path(target), dict(SIDES[side][1])
    if include_code is False:
        return write_code(folder, target, side, None, classes)
    running, there = read_entry(HERE), read_entry(target)
    brought = {name for found in running["sides"].values() for name in found["packages"]}
    foreign = sorted(_homes(owner.config, side) - brought)
    others_code = {name: found for name, found in there.get("sides", {}).items() if name != side}
    if foreign or any(running["sides"].get(name) != found for name, found in others_code.items()):
        raise ValueError(
            f"The code of this checkpoint cannot be saved together with {foreign or sorted(others_code)}, which it did not "
            f"bring along: {INSTALL} (a clone or a wheel) and import it first, or save elsewhere, or with include_code=False."
        )
    if type(owner).__name__ in vars(sys.modules[f"{ROOT}.{CODE_ENTRY}"]):  # a class of the user's
        classes |= {key: type(owner).__name__ for key in classes if key != "AutoConfig"}
    texts = {stem: (HERE / f"{stem}.py").read_text(encoding="utf-8") for stem in running["files"]}
    return write_code(folder, target, side, texts, classes)


def _homes(config: Any, side: str) -> set[str]:
    """Modules, neither libraries' nor of the running code, that define what a configuration names."""
    encoders = [] if side == "projector" else config.encoders
    projectors = [config] if side == "projector" else [getattr(config, f"{n}_projector_config") for n in encoders]
    targets: list[Any] = [PROJECTORS[projector.projection_type] for projector in projectors]
    for name in encoders:
        described = config.modality(name)["callbacks"].values()
        targets += [type(getattr(config, f"{name}_config")), *(CALLBACKS[each["name"]].target for each in described)]
    homes = {str(getattr(getattr(target, "func", target), "__module__", "")) for target in targets}
    homes = {home for home in homes if home.split(".")[0] not in ("torch", "transformers")}
    return {home for home in homes if not home.startswith(f"{ROOT}.")}
