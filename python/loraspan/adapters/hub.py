"""Adapters on the Hugging Face Hub (the extra ``loraspan[hub]``)."""

from __future__ import annotations

import re
from pathlib import Path

from loraspan.errors import ArgumentError, FormatError

# what the Hub allows; no part is . or .., so an id is never a way out of a folder
_ID = re.compile(r"[A-Za-z0-9][\w.\-]{0,95}/[A-Za-z0-9][\w.\-]{0,95}", re.ASCII)
_FILES = ["adapter_config.json", "adapter_model.safetensors", "README.md"]


def is_id(text: str) -> bool:
    """Tell whether a text could be a Hub id ``owner/name``.

    Example:
        >>> is_id("owner/sql-lora"), is_id("../sql"), is_id("a/b/c")
        (True, False, False)
    """
    return _ID.fullmatch(text) is not None


def download(hub_id: str) -> Path:
    """Give the folder of an adapter on the Hub, from the local cache or by download.

    ``HF_HUB_OFFLINE`` and the other settings of ``huggingface_hub`` hold: offline, only the cache is looked at.

    Raises:
        ArgumentError: if ``huggingface_hub`` is not installed.
        FormatError: if the Hub or the cache does not give it.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise ArgumentError(
            f"{hub_id}: there is no such path, and to look for it on the Hub needs huggingface_hub: "
            "pip install 'loraspan[hub]'"
        ) from None
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=_FILES))
    except (OSError, ValueError) as error:
        # every error of the library's is one of these two; a connection that fails as well
        raise FormatError(f"{hub_id}: there is no such path, and the Hub does not give it: {error}") from None
