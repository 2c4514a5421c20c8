"""An engine for tests that says it has new weights and keeps the old ones."""

from pathlib import Path
from typing import Any

from rollout.torch_engine import TorchEngine


class Forgetful(TorchEngine):
    """Its first weights are its last."""

    def load_weights(self, file: Path, **settings: Any) -> None:
        """Nothing."""
        self.version = settings.get("version", 0)


def forgetful(model_dir: Path, *, device: str, dtype: str) -> Forgetful:
    """Called by rollout.worker.load_engine."""
    return Forgetful(model_dir, device="cpu" if device == "auto" else device, dtype=dtype)
