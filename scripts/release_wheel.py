"""Builds what a release publishes: the sdist and, from it, the wheel; tags it and checks both.

A release holds code for every architecture, whatever TORCH_CUDA_ARCH_LIST says, and a missing CUDA
toolkit is an error. The op library serves every CPython, `_C` only the one that builds it: for a
wheel of another CPython, MERGE_ATTN_STATES_OP_LIBRARY names the first wheel's op library, which is
packed as it is.

--trial builds what the environment asks for instead and checks everything else.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from cuda_toolkit import DEFAULT_ARCHITECTURES, note, refuse

ROOT = Path(__file__).resolve().parents[1]
OP_LIBRARY = "libmerge_attn_states.so"
LARGEST_OP_LIBRARY = 10_000_000  # bytes
NEWEST_GLIBC = (2, 34)  # README's promise; Debian 12 and manylinux_2_34 build within it
# Examples, tests and benchmarks are the source distribution's.
PACKAGE = re.compile(r"merge_attn_states/|merge_attn_states_vllm\.py$|[^/]+\.dist-info/")
NOT_OURS = ("libtorch*.so", "libc10*.so")  # PyTorch brings them; a copy would be a second PyTorch


def release_environment(environ: dict[str, str]) -> dict[str, str]:
    """The environment of a release build: no inherited variable leaves anything out."""
    everything = " ".join(DEFAULT_ARCHITECTURES)
    asked = environ.get("TORCH_CUDA_ARCH_LIST", "")
    if asked and asked.replace(";", " ").split() != list(DEFAULT_ARCHITECTURES):
        note(f"TORCH_CUDA_ARCH_LIST={asked} is ignored: a release has {everything}")
    return environ | {
        "MERGE_ATTN_STATES_CUDA": "1",
        "MERGE_ATTN_STATES_SANITIZE": "0",
        "TORCH_CUDA_ARCH_LIST": everything,  # by name: an older nvcc refuses instead of leaving out
    }


def run(*command: str, env: dict[str, str] | None = None) -> str:
    """What the command printed; where it fails, this program shows its output and ends."""
    ran = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if ran.returncode:
        print((ran.stdout + ran.stderr)[-6000:], file=sys.stderr)
        refuse(f"{' '.join(command[:4])} failed; its output stands above.")
    return ran.stdout


def build(work: Path, env: dict[str, str]) -> tuple[Path, Path]:
    log = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(work), env=env)
    for line in dict.fromkeys(re.findall(r"^merge_attn_states: .*", log, re.MULTILINE)):
        print(line, flush=True)
    (sdist,), (wheel,) = work.glob("*.tar.gz"), work.glob("*.whl")
    return sdist, wheel


def audit_of(wheel: Path) -> dict:
    return json.loads(run(sys.executable, "-m", "auditwheel", "show", "--json", str(wheel)))


def tag(wheel: Path) -> Path:
    """Rename the wheel after the oldest platform that has its symbols; the binaries stay.

    `auditwheel repair` would do the same, since there is nothing to copy, but needs patchelf.
    """
    platform = audit_of(wheel)["sym_tag"]
    run(sys.executable, "-m", "wheel", "tags", "--remove", "--platform-tag", platform, str(wheel))
    (tagged,) = wheel.parent.glob("*.whl")
    return tagged


def gpu_code(library: bytes) -> Iterator[str]:
    """The architecture of each piece of GPU code, as TORCH_CUDA_ARCH_LIST names it.

    nvcc embeds fat binaries: a header of 16 bytes (magic, version, its own size, the size of what
    follows), then one entry a piece (kind, size of its header, size of its code, architecture).
    """
    for found in re.finditer(re.escape(struct.pack("<IHH", 0xBA55ED50, 1, 16)), library):
        at = found.start() + 16
        end = at + struct.unpack_from("<Q", library, at - 8)[0]
        while at < end:
            kind, _, header, size = struct.unpack_from("<HHIQ", library, at)
            major, minor = divmod(struct.unpack_from("<I", library, at + 28)[0], 10)
            yield f"{major}.{minor}" + {1: "+PTX", 2: ""}[kind]
            at += header + size


def architectures(library: bytes) -> list[str]:
    """The architectures for which every CUDA source has code, with +PTX where it has PTX too."""
    pieces = list(gpu_code(library))
    whole = {name for name in pieces if pieces.count(name) == max(map(pieces.count, pieces))}
    binaries = sorted((name for name in whole if "+" not in name), key=float)
    return [name + "+PTX" * (f"{name}+PTX" in whole) for name in binaries]


def faults(wheel: Path, audit: dict, wanted: list[str] | None) -> Iterator[str]:
    """What keeps the wheel from being published; `audit` is `auditwheel show --json` of it."""
    platform = wheel.stem.rpartition("-")[2]
    if platform != audit["sym_tag"]:
        yield f"it is tagged {platform}, and its symbols need {audit['sym_tag']}"
    glibc = re.fullmatch(r"manylinux_(\d+)_(\d+)_\w+", platform)
    if not glibc or (wanted and tuple(map(int, glibc.groups())) > NEWEST_GLIBC):
        promised = "manylinux_{}_{}".format(*NEWEST_GLIBC)
        yield f"it is tagged {platform}: build on a system of {promised} or older"
    for name in audit["external_libs"]:
        if not any(Path(name).match(pattern) for pattern in NOT_OURS):
            yield f"it needs {name}, which neither the system nor PyTorch brings"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        libraries = {name: archive.read(name) for name in names if ".so" in name}
    for name in names:
        if name not in libraries and not PACKAGE.match(name):
            yield f"{name} is not of the package"
    op_library = libraries.pop(f"merge_attn_states/{OP_LIBRARY}", None)
    module = next((name for name in libraries if name.startswith("merge_attn_states/_C.")), None)
    if op_library is None or module is None:
        yield f"{OP_LIBRARY} or _C is missing"
        return
    yield from module_faults(libraries.pop(module))
    for name in libraries:
        yield f"{name} is vendored"
    if len(op_library) > LARGEST_OP_LIBRARY:
        yield f"the op library has {len(op_library):,} bytes, more than {LARGEST_OP_LIBRARY:,}"
    if wanted and architectures(op_library) != wanted:
        yield f"its GPU code is for {architectures(op_library)}, not for {wanted}"


def module_faults(module: bytes) -> Iterator[str]:
    with tempfile.NamedTemporaryFile() as file:
        file.write(module)
        file.flush()
        dynamic = run("readelf", "-d", file.name)
    if not re.search(r"\(R(UN)?PATH\).*\[\$ORIGIN\]", dynamic):
        yield "_C does not look for the op library beside itself ($ORIGIN)"
    if f"[{OP_LIBRARY}]" not in dynamic:
        yield "_C is not linked against the op library"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--outdir", type=Path, default=ROOT / "dist")
    parser.add_argument("--trial", action="store_true", help="whatever the environment asks for")
    options = parser.parse_args()
    given = dict(os.environ)
    if library := given.get("MERGE_ATTN_STATES_OP_LIBRARY"):
        given["MERGE_ATTN_STATES_OP_LIBRARY"] = str(Path(library).resolve())

    with tempfile.TemporaryDirectory() as folder:
        env = given if options.trial else release_environment(given)
        sdist, built = build(Path(folder), env)
        wheel = tag(built)
        wanted = None if options.trial else list(DEFAULT_ARCHITECTURES)
        if found := list(faults(wheel, audit_of(wheel), wanted)):
            refuse(f"{wheel.name} is not fit to be published: {'; '.join(found)}.")
        run(sys.executable, "-m", "twine", "check", "--strict", str(sdist), str(wheel))
        options.outdir.mkdir(parents=True, exist_ok=True)
        for file in (sdist, wheel):
            kept = Path(shutil.move(file, options.outdir / file.name))
            note(f"{kept}, {kept.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
