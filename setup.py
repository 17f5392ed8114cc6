"""The build option `native`: a wheel for this platform, with the native kernels in it.

    pip wheel . -C--build-option=--native

Without the option the wheel is pure Python and runs everywhere.
"""

from pathlib import Path
from typing import ClassVar

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel


class Wheel(bdist_wheel):
    """Builds a pure wheel, or with `--native` one with the native kernels."""

    user_options: ClassVar = [*bdist_wheel.user_options, ("native", None, "put the native kernels into the wheel")]
    boolean_options: ClassVar = [*bdist_wheel.boolean_options, "native"]

    def initialize_options(self) -> None:
        super().initialize_options()
        self.native = False

    def finalize_options(self) -> None:
        if self.native:
            self.distribution.has_ext_modules = lambda: True  # so that setuptools takes the wheel for a platform's
        super().finalize_options()

    def run(self) -> None:
        if self.native:
            self.run_command("build")
            folder = Path(self.get_finalized_command("build").build_lib) / "tilewright" / "kernels" / "native"
            self.spawn(["make", "native", f"PREFIX={folder.absolute()}"])
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        return ("py3", "none", tag[2]) if self.native else tag  # the library is loaded by ONNX Runtime, not by Python


setup(cmdclass={"bdist_wheel": Wheel})
