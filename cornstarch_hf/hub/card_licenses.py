"""Licences of the bases of a composed model: asked of the Hub where that is possible, and what follows for the whole."""

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

from huggingface_hub import HfApi

logger = logging.getLogger(__name__)
TIMEOUT = 10.0  # seconds for each base
LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,99}")


def find_licenses(
    commits: Mapping[str, str | None], given: Mapping[str, str] | None = None, token: str | bool | None = None
) -> dict[str, str | None]:
    """The licence of each base, None where it is not known.

    Never fails: a card that says "unknown" is better than a push that stops for a licence.

    Args:
        commits: the bases' repositories, with the commit of each, None where that is not known.
        given: licences by repository, which are taken as they are.
        token: of the Hub; False asks nothing.

    Raises:
        ValueError: a given licence that is no identifier such as ``apache-2.0``.
    """
    given = dict(given or {})
    for repo_id, name in given.items():
        check_license(name, f"licenses[{repo_id!r}]")
    return {
        repo_id: given[repo_id] if repo_id in given else None if token is False else _asked(repo_id, commit, token)
        for repo_id, commit in commits.items()
    }


def _asked(repo_id: str, commit: str | None, token: str | bool | None) -> str | None:
    try:
        data: Any = HfApi().model_info(repo_id, revision=commit, token=token, timeout=TIMEOUT).card_data
    except Exception as error:  # offline, private, gone, a proxy in between: the reason is not the card's business
        logger.info("The licence of %s is not known (%s).", repo_id, type(error).__name__)
        return None
    names = [data.get("license_name"), data.get("license")] if data is not None else []
    # What others wrote in their cards becomes text of this one: identifiers only.
    known = [name for name in names if isinstance(name, str) and LICENSE.fullmatch(name)]
    return known[0] if known else None


def check_license(name: Any, where: str) -> None:
    """Refuse what is no licence identifier (ValueError)."""
    if not isinstance(name, str) or not LICENSE.fullmatch(name):
        raise ValueError(f"{where} must be an identifier such as 'apache-2.0', got {name!r:.100}.")


def license_fields(own: str | None, bases: Iterable[str | None]) -> dict[str, str]:
    """The metadata of a card that tells its licence.

    Args:
        own: what the user said.
        bases: of every part; None where it is not known.

    Returns:
        the user's word; else the one that all bases have; ``other`` where known ones differ; nothing where one is
        unknown, since an unknown licence allows no promise.

    Raises:
        ValueError: `own` is no licence identifier.
    """
    if own is not None:
        check_license(own, "license")
        return {"license": own}
    found = list(bases)
    known = {name for name in found if name is not None}
    if len(known) > 1:
        return {"license": "other", "license_name": "those-of-its-parts"}
    return {"license": known.pop()} if known and None not in found else {}
