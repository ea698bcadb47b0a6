"""Names of a model's modules and parameters in one walk: torch's own generators nest once per level, for every name."""

from collections.abc import Iterator

from torch import nn


def modules_by_name(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module with its dotted name, parents first, one that stands in two places under both names.

    As `root.named_modules(remove_duplicate=False)`.
    """
    pending = [("", root)]
    while pending:
        name, module = pending.pop()
        yield name, module
        prefix = f"{name}." if name else ""
        pending += [(prefix + key, child) for key, child in reversed(module._modules.items()) if child is not None]


def parameters_by_name(root: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter with its dotted name, shared ones under each of their names.

    As `root.named_parameters(remove_duplicate=False)`.
    """
    for name, module in modules_by_name(root):
        prefix = f"{name}." if name else ""
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield prefix + key, parameter
