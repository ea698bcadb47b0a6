"""Prints the lowest version that pyproject.toml allows of each requirement, as constraints for pip: `make test-lowest`."""

import tomllib
from pathlib import Path

PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def lowest_pins() -> list[str]:
    """The bounds of dependencies, extras and the build, as ``name==version``.

    Raises:
        ValueError: a requirement whose lowest version is not told by ``>=``.
    """
    described = tomllib.loads(PROJECT.read_text(encoding="utf-8"))
    project = described["project"]
    groups = [
        described["build-system"]["requires"],
        project["dependencies"],
        *project["optional-dependencies"].values(),
    ]
    pins = []
    for requirement in (one for group in groups for one in group if not one.startswith(f"{project['name']}[")):
        name, _, versions = requirement.partition(">=")
        version = versions.partition(",<")[0]
        if not name.replace("-", "").replace("_", "").isalnum() or not version.replace(".", "").isdigit():
            raise ValueError(
                f"pyproject.toml: expected a requirement of the form name>=version or name>=version,<version, got {requirement!r}."
            )
        pins.append(f"{name}=={version}")
    return list(dict.fromkeys(pins))


if __name__ == "__main__":
    print("\n".join(lowest_pins()))
