"""What a trained adapter or a saved learner state belongs to: on another base it is wrong."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from avatar_rl.common.errors import ModelError
from avatar_rl.common.types import JsonObject
from avatar_rl.common.weight_files import fingerprint
from avatar_rl.learner.lora_config import LoraConfig

#: Beside an adapter's files and in a learner state.
FILE = "avatar_base.json"


@dataclass(frozen=True)
class BaseRecord:
    """The model that something was trained on, by content."""

    model: str  # its folder, where it was
    fingerprint: str  # of its weights
    lora: JsonObject | None  # the adapter's settings; None: the model itself was trained

    @classmethod
    def of(cls, model: Path, lora: LoraConfig | None) -> BaseRecord:
        """Reads samples of every weight file. Raises ModelError as ``WeightFiles.find`` does."""
        settings = None if lora is None else lora.model_dump(mode="json")
        return cls(str(model.resolve()), fingerprint(model), settings)

    @classmethod
    def read(cls, folder: Path) -> BaseRecord | None:
        """The record in ``folder``; None where there is none. Raises ModelError for a damaged
        one."""
        file = folder / FILE
        if not file.is_file():
            return None
        try:
            return cls(**json.loads(file.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise ModelError(
                f"{file} is damaged ({error}): copy it again from its source"
            ) from error

    def content(self) -> bytes:
        """What ``read`` reads."""
        return (json.dumps(asdict(self), indent=2) + "\n").encode()

    def check(self, found: BaseRecord | None, where: Path) -> None:
        """``found`` is what lies ``where`` something is loaded from onto this base.

        Raises ModelError naming both bases, or adapters, where they differ. A state of before there
        were records is one of a whole model.
        """
        if found is None:
            if self.lora is not None:
                raise ModelError(
                    f"{where} holds the state of a whole model, but learner.lora is set: leave it "
                    "out, or start a new run"
                )
            return
        if found.fingerprint != self.fingerprint:
            what = "an adapter" if found.lora is not None else "a policy"
            raise ModelError(
                f"{where} holds {what} of another base: it was trained on {found.model} "
                f"({found.fingerprint[:12]}), and {self.model} has other weights "
                f"({self.fingerprint[:12]}); give it its own base"
            )
        if _shape(found.lora) != _shape(self.lora):
            raise ModelError(
                f"{where} was trained with learner.lora {_shape(found.lora)}, this is "
                f"{_shape(self.lora)}: put it back, or start a new run"
            )


def _shape(lora: JsonObject | None) -> JsonObject | None:
    """The settings that decide what the weights mean."""
    return lora and {name: value for name, value in lora.items() if name != "dropout"}
