"""Builds the package's two binaries; pyproject.toml describes everything else.

libmerge_attn_states.so  the op library: kernels and op registration on PyTorch's stable ABI. It
                         names no Python symbol, so that one build serves every CPython, and none
                         of libtorch_cuda, so that a CPU-only PyTorch loads its CUDA kernels too.
_C                       the Python module; it links against the op library beside it by $ORIGIN.

Environment:
  MERGE_ATTN_STATES_CUDA=auto|1|0         1: a missing toolkit is an error; 0: no CUDA kernels
  TORCH_CUDA_ARCH_LIST                    architectures, for example "9.0" or "8.0 10.0+PTX"
  CUDA_HOME                               the toolkit; else /usr/local/cuda, else what nvcc reports
  MERGE_ATTN_STATES_OP_LIBRARY=path       builds _C alone, against this op library, and packs it
  MERGE_ATTN_STATES_SANITIZE=1            CPU build under AddressSanitizer and UBSan
  CXX, MAX_JOBS                           the C++ compiler; parallel compilations
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:  # an sdist can be made without PyTorch
    torch = None

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "scripts"))
from cuda_toolkit import choose_toolkit, note, refuse  # noqa: E402  pip's sys.path lacks this folder

OWN_HEADERS = [str(ROOT / "include"), str(ROOT / "csrc")]
OP_LIBRARY = "libmerge_attn_states.so"
SERIAL = "csrc/cpu/parallel_serial.cpp"  # threads of a build without PyTorch
MODULE_ONLY = [
    f"csrc/torch/{name}.cpp"
    for name in (
        *("eager", "eager_path", "eager_ranks", "eager_states"),
        *("python_tensor", "thread_state"),
    )
]
MODULE_SOURCES = [*MODULE_ONLY, "csrc/torch/stable_tensor.cpp"]  # the last one is in both
OLDEST_TORCH = (2, 11)
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # 2.11, the same release in its own form

# No contraction anywhere: two builds of one loop must give the same bits.
CXX_FLAGS = ["-std=c++20", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-Wno-psabi"]
CXX_FLAGS += ["-ffp-contract=off"]
RELEASE_FLAGS = ["-O3", "-g0"]
# -fno-wrapv: Python's own flags hold -fwrapv, under which UBSan sees no overflow.
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
SANITIZE_FLAGS = ["-O1", "-g", *SANITIZE, "-fno-wrapv", "-fno-omit-frame-pointer"]
NVCC_FLAGS = ["-O3", "-std=c++20", "-fmad=false", "--expt-relaxed-constexpr"]
NVCC_FLAGS += ["-Xfatbin", "-compress-all", "--threads", "2"]  # architectures beside each other
NVCC_FLAGS += ["-Xcompiler", "-fvisibility=hidden,-ffp-contract=off"]


def sanitizing() -> bool:
    return os.environ.get("MERGE_ATTN_STATES_SANITIZE", "0") not in ("", "0")


def op_sources(pattern: str, *without: str) -> list[str]:
    found = (str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))
    return sorted(path for path in found if path not in without)


def commit() -> str:
    """The commit of these sources: from git, else from the file that an sdist carries."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        git = ["git", "-C", str(ROOT), "-c", f"safe.directory={ROOT}"]

        def said(*command: str) -> str | None:
            ran = subprocess.run([*git, *command], capture_output=True, text=True, check=False)
            return ran.stdout.strip() if ran.returncode == 0 else None

        if described := said("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"):
            # New files there are built too, and are no change that `describe` sees.
            folders = ("csrc", "include", "python")
            new = said("ls-files", "--others", "--exclude-standard", "--", *folders)
            return f"{described.removesuffix('-dirty')}-dirty" if new else described
    carried = ROOT / "COMMIT"
    return carried.read_text().strip() if carried.is_file() else "unknown"


def write_if_changed(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


class BuildBinaries(cpp_extension.BuildExtension if torch else build_ext):
    def finalize_options(self) -> None:
        super().finalize_options()
        # One object folder, whoever asks (pip, build, setup.py): what did not change stays built.
        self.objects = ROOT / "build" / ("objects-sanitize" if sanitizing() else "objects")
        self.build_temp = str(self.objects)
        self.parallel = None  # _C links against the op library

    def run(self) -> None:
        if sys.platform != "linux":
            refuse(f"only Linux is supported, and this is {sys.platform}.")
        if torch is None:
            refuse("PyTorch 2.11 or newer is needed to build, and this Python has none.")
        if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
            refuse(f"PyTorch 2.11 or newer is needed to build, and this is {torch.__version__}.")
        compiler = (shlex.split(cpp_extension.get_cxx_compiler()) or [""])[0]
        if not shutil.which(compiler):
            refuse(f"no C++ compiler {compiler!r}: install the package g++ or build-essential.")
        if not importlib.util.find_spec("pybind11"):
            refuse("pybind11 is missing: pip install pybind11 ninja.")
        if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
            refuse("Python.h is missing: install the package python3-dev or python3-devel.")
        # The environment's own ninja first: another release would start its log, and so the build,
        # all over. PATH need not name it.
        if importlib.util.find_spec("ninja"):
            import ninja

            # BIN_DIR is empty where another environment's site-packages are linked.
            folder = ninja.BIN_DIR or str(Path(ninja.__file__).parents[4] / "bin")
            os.environ["PATH"] = folder + os.pathsep + os.environ["PATH"]
        super().run()

    def build_extensions(self) -> None:
        op_library, module = self.extensions
        self.given = os.environ.get("MERGE_ATTN_STATES_OP_LIBRARY")
        if self.given and not Path(self.given).is_file():
            refuse(f"MERGE_ATTN_STATES_OP_LIBRARY: there is no file {self.given}.")
        if not self.given:
            self.configure_op_library(op_library)
        self.configure_module(module, Path(self.get_ext_fullpath(op_library.name)).parent)
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        # A folder each: BuildExtension writes one build.ninja into build_temp.
        self.build_temp = str(self.objects / ext.name.rpartition(".")[2])
        if self.given and ext is self.extensions[0]:
            target = Path(self.get_ext_fullpath(ext.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            # Not in place: a process that has the old file mapped would run the new one's bytes.
            shutil.copyfile(self.given, fresh := target.with_suffix(".new"))
            fresh.replace(target)
            note(f"the op library is {self.given}")
            return
        try:
            super().build_extension(ext)
        except RuntimeError:  # ninja's output is the error; a traceback would bury it
            refuse("the compilation failed; the compiler's message stands above.")

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.rpartition(".")[2] == Path(OP_LIBRARY).stem:
            return str(Path(*fullname.split(".")[:-1], OP_LIBRARY))  # for every CPython: no ABI tag
        return super().get_ext_filename(fullname)

    def configure_op_library(self, ext: Extension) -> None:
        not_wanted = ""
        if sanitizing():
            not_wanted = "MERGE_ATTN_STATES_SANITIZE=1 is a CPU build"
        elif torch.version.hip:
            not_wanted = f"PyTorch {torch.__version__} is a ROCm build"
        cuda = choose_toolkit(not_wanted)
        # The commit has a header of its own: as a flag, it would rebuild every file each time.
        generated = self.objects / "include"
        write_if_changed(
            generated / "merge_attn_states_commit.h",
            f'#define MERGE_ATTN_STATES_BUILD_COMMIT "{commit()}"\n',
        )
        built = {
            "VERSION": self.distribution.get_version(),
            "TORCH": torch.__version__,
            "CUDA": cuda.version if cuda else "",
            "ARCHITECTURES": " ".join(cuda.architectures) if cuda else "",
        }
        defines = [f'-DMERGE_ATTN_STATES_BUILD_{key}="{text}"' for key, text in built.items()]
        defines.append(STABLE_ABI)
        for folder in ("csrc", "csrc/core", "csrc/cpu", "csrc/torch"):
            ext.sources += op_sources(f"{folder}/*.cpp", *MODULE_ONLY, SERIAL)
        ext.include_dirs += [*OWN_HEADERS, str(generated), *cpp_extension.include_paths()]
        ext.library_dirs += cpp_extension.library_paths()
        ext.libraries += ["torch_cpu"]
        # Visibility alone leaves symbols of std:: exported; exports.map closes the list.
        ext.extra_link_args += ["-Wl,--exclude-libs,ALL", f"-Wl,-soname,{OP_LIBRARY}"]
        ext.extra_link_args += [f"-Wl,--version-script={ROOT / 'csrc/exports.map'}"]
        ext.depends += ["csrc/exports.map"]
        flags = SANITIZE_FLAGS if sanitizing() else RELEASE_FLAGS
        if sanitizing():
            ext.sources += op_sources("tests/sanitizer/*.cpp")
            ext.extra_link_args += SANITIZE
        if cuda:
            defines.append("-DMERGE_ATTN_STATES_WITH_CUDA")
            ext.sources += op_sources("csrc/cuda/*.cu") + op_sources("csrc/cuda/*.cpp")
            ext.include_dirs.append(str(cuda.home / "include"))
            ext.library_dirs.append(str(cuda.home / "lib64"))
            ext.libraries += ["cudart_static", "dl", "rt", "pthread"]
            # A CPU PyTorch's BuildExtension reads no CUDA_HOME; and it lets nvcc track headers
            # only where torch.version.cuda is set. Nothing of PyTorch's CUDA is linked, so the
            # toolkit's own version is the one to hold the build against.
            cpp_extension.CUDA_HOME = str(cuda.home)
            torch.version.cuda = cuda.version
        ext.extra_compile_args = {
            "cxx": [*CXX_FLAGS, *flags, *defines],
            "nvcc": [*NVCC_FLAGS, *(cuda.gencodes() if cuda else []), *defines],
        }

    def configure_module(self, ext: Extension, op_library_folder: Path) -> None:
        import pybind11

        # Of PyTorch's headers, ATen/dlpack.h and the stable C functions.
        ext.sources += MODULE_SOURCES
        ext.include_dirs += [*OWN_HEADERS, pybind11.get_include(), *cpp_extension.include_paths()]
        ext.library_dirs += [str(op_library_folder), *cpp_extension.library_paths()]
        ext.libraries += ["torch_cpu"]
        ext.extra_compile_args = [*CXX_FLAGS, *(SANITIZE_FLAGS if sanitizing() else RELEASE_FLAGS)]
        ext.extra_link_args += [f"-l:{OP_LIBRARY}", "-Wl,-rpath,$ORIGIN", "-Wl,--exclude-libs,ALL"]
        ext.extra_link_args += SANITIZE if sanitizing() else []


class SourceDistribution(sdist):
    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        Path(base_dir, "COMMIT").unlink(missing_ok=True)  # never write through a hard link
        Path(base_dir, "COMMIT").write_text(commit() + "\n")


setup(
    license="Apache-2.0",  # in pyproject.toml, a setuptools before 77 refuses an SPDX name
    ext_modules=[
        Extension(f"merge_attn_states.{Path(OP_LIBRARY).stem}", [], language="c++"),
        Extension("merge_attn_states._C", [], language="c++"),
    ],
    cmdclass={"build_ext": BuildBinaries, "sdist": SourceDistribution},
)
