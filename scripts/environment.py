"""Sets up a virtual environment for the build: PyTorch, the build tools, the extras asked for.

Run by the interpreter that the environment is made from. Where that one imports a PyTorch that is
new enough, the environment uses it and downloads no other; with --release it gets that release of
PyTorch for itself. Only the standard library is used.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TORCH_VERSION = "import torch; print(torch.__version__)"


def refuse(sentence: str) -> None:
    raise SystemExit(f"merge_attn_states: {sentence}")


def check_machine() -> None:
    """Refuse, before anything is downloaded, where the machine lacks what the build needs."""
    if sys.version_info < (3, 10):  # noqa: UP036  any python3 may run this
        refuse(f"Python 3.10 or newer is needed, and {sys.executable} is {sys.version.split()[0]}.")
    try:
        import ensurepip  # noqa: F401  Debian's python3 has venv without it
    except ImportError:
        refuse("Python's venv module is incomplete: install the package python3-venv.")
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        refuse("Python.h is missing: install the package python3-dev (Fedora: python3-devel).")
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if not shutil.which(compiler):
        refuse(f"no C++ compiler {compiler!r}: install the package g++ (Fedora: gcc-c++).")


def torch_version(python: Path | str) -> tuple[int, int] | None:
    ran = subprocess.run([python, "-c", TORCH_VERSION], capture_output=True, text=True, check=False)
    if ran.returncode:
        return None
    major, minor = ran.stdout.split(".")[:2]
    return int(major), int(minor)


def link_site_packages(environment: Path, python: Path) -> None:
    """Lets the environment import this interpreter's packages where it has none of its own.

    --system-site-packages would not do where this interpreter is a virtual environment's: it links
    the packages of the base interpreter instead.
    """
    folders = [folder for folder in sys.path if Path(folder).name.endswith("-packages")]
    lines = [f"import site; site.addsitedir({folder!r})\n" for folder in folders]
    own = sysconfig.get_path("purelib", "venv", {"base": str(environment)})
    Path(own, "linked.pth").write_text("".join(lines))
    if torch_version(python) is None:
        refuse(f"{python} cannot import the PyTorch of {sys.executable}; set PYTHON or TORCH.")


def requirements(extras: list[str]) -> list[str]:
    try:
        import tomllib
    except ImportError:  # Python 3.10
        from pip._vendor import tomli as tomllib
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = [one for one in project["build-system"]["requires"] if not one.startswith("torch")]
    return needed + [one for e in extras for one in project["project"]["optional-dependencies"][e]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("environment", type=Path)
    parser.add_argument("--torch", default="torch==2.13.0", help="installed where there is none")
    parser.add_argument("--release", help="of PyTorch: exactly this one is installed")
    parser.add_argument("--extra", action="append", default=[], help="of pyproject.toml")
    options = parser.parse_args()
    if options.release:
        options.torch = f"torch=={options.release}"
        # A release that is asked for by name is not held back by a constraints file of the machine.
        os.environ["PIP_CONSTRAINT"] = os.devnull
    python = options.environment / "bin" / "python"
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "-qq"]

    if not python.exists() or (torch_version(python) or (0, 0)) < (2, 11):
        check_machine()
        venv.create(options.environment, with_pip=True, clear=options.environment.exists())
        if not options.release and (torch_version(sys.executable) or (0, 0)) >= (2, 11):
            print(f"using the PyTorch of {sys.executable}", flush=True)
            link_site_packages(options.environment, python)
        else:
            print(f"installing {options.torch}", flush=True)
            subprocess.run([*pip, *shlex.split(options.torch)], check=True)
    subprocess.run([*pip, *requirements(options.extra)], check=True)


if __name__ == "__main__":
    if site.ENABLE_USER_SITE is None:
        refuse("this interpreter was started without its packages (-I or -S).")
    try:
        main()
    except subprocess.CalledProcessError as error:
        refuse(f"a step of the set-up failed: {shlex.join(map(str, error.cmd))}")
