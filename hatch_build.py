"""Put the reference model into the wheel, where `text2weight.checkpoint.bundled_checkpoint` looks for it.

An editable install finds it in the checkout, so it must not copy tens of megabytes; a static
`force-include` could not tell the two apart.
"""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ReferenceModelHook(BuildHookInterface[Any]):
    """Include models/reference in standard wheels."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the folder's files to the wheel, unless this is an editable build."""
        folder = Path(self.root) / "models" / "reference"
        if version == "standard" and folder.is_dir():
            build_data["force_include"][str(folder)] = "text2weight/reference_model"
