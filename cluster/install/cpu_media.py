"""Make torchvision and torchaudio importable beside a CPU build of torch, only where they are not.

The package index carries CUDA builds of both. Beside CPU torch, torchvision's compiled library
cannot load, so the operator schemas that its Python part annotates are missing and the import
fails; torchaudio's and torchcodec's libraries fail the same way. Proper CPU builds are left alone.
docs/dependencies.md."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path

SHIM = '''\
"""Operator schemas that torchvision's Python part annotates, where its library cannot load."""
import sys


class _BeforeTorchvision:
    """Does nothing until torchvision is first imported; never finds a module itself."""

    library = None

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "torchvision" and cls.library is None:
            import torch

            cls.library = torch.library.Library("torchvision", "FRAGMENT")
            for schema in ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
                           "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"):
                try:
                    cls.library.define(schema)
                except RuntimeError:  # the real operator is there
                    pass
        return None


sys.meta_path.insert(0, _BeforeTorchvision)
'''


def imports(module: str) -> bool:
    """Whether a fresh interpreter can import ``module``."""
    return (
        subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True).returncode
        == 0
    )


def installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def cure() -> list[str]:
    """Apply what is needed; returns one line per thing done. Raises SystemExit when the cure did
    not work."""
    import torch

    if torch.version.cuda is not None:
        return []
    site = Path(sysconfig.get_paths()["purelib"])
    done: list[str] = []
    if installed("torchcodec") and not imports("torchcodec"):
        subprocess.run(
            [sys.executable, "-m", "pip", "uninstall", "-y", "-q", "torchcodec"], check=True
        )
        done.append("removed torchcodec (CUDA build; media are decoded with PyAV)")
    if installed("torchvision") and not imports("torchvision"):
        (site / "_avatar_torchvision_cpu.py").write_text(SHIM)
        (site / "avatar_torchvision_cpu.pth").write_text("import _avatar_torchvision_cpu\n")
        done.append("defined torchvision's operator schemas for CPU torch")
    if installed("torchaudio") and not imports("torchaudio"):
        for library in (site / "torchaudio" / "lib").glob("*.so"):
            library.rename(library.with_suffix(".so.cuda"))
        done.append("set torchaudio's CUDA libraries aside (its pure-torch part is kept)")
    broken = [
        name for name in ("torchvision", "torchaudio") if installed(name) and not imports(name)
    ]
    if broken:
        sys.exit(
            f"{', '.join(broken)} still cannot be imported beside torch {torch.__version__}: "
            "install CPU builds"
        )
    return done


if __name__ == "__main__":
    for line in cure():
        print(f"  {line}")
