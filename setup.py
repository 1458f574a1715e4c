"""Build of the C++ extension and the mapping of the two package roots."""

from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import find_packages, setup

CSRC = Path("csrc")

extension = Pybind11Extension(
    "samv2._rle",
    sources=sorted(str(path) for path in CSRC.glob("*.cpp")),
    include_dirs=[str(CSRC)],
    depends=sorted(str(path) for path in CSRC.glob("*.h")),
    cxx_std=17,
    # Sums must not depend on whether the machine can fuse a product with an addition.
    extra_compile_args=["-O3", "-ffp-contract=off"],
)

setup(
    packages=find_packages(include=["samv2", "samv2.*"])
    + find_packages(where="kernels"),
    package_dir={"samv2_kernels": "kernels/samv2_kernels"},
    package_data={
        "samv2": [
            "configs/*.toml",
            "configs/grids/*.toml",
            "common/templates/*.json",
            "report/templates/*",
            "py.typed",
        ],
        "samv2_kernels": ["py.typed"],
    },
    ext_modules=[extension],
    cmdclass={"build_ext": build_ext},
)
