"""What pyproject.toml can't say: a wheel has within the package what a checkout has beside it (see repository.py)."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
COPIED = ("Snakefile", "environment.yml", "conf/**/*", "profiles/**/*", "workflow/**/*")


class WithRepository(build_py):
    """Copies the workflow and the presets to salsa/repository; an editable installation finds them in the checkout."""

    def run(self):
        super().run()
        if not self.editable_mode:
            for source, target in self.copies().items():
                self.mkpath(str(Path(target).parent))
                self.copy_file(source, target)

    def copies(self):
        """Source -> target, as paths."""
        folder = Path(self.build_lib) / "salsa" / "repository"
        files = sorted(path for pattern in COPIED for path in ROOT.glob(pattern) if path.is_file())
        return {str(path): str(folder / path.relative_to(ROOT)) for path in files}

    def get_outputs(self, include_bytecode=True):
        outputs = super().get_outputs(include_bytecode)
        return outputs if self.editable_mode else [*outputs, *self.copies().values()]


setup(cmdclass={"build_py": WithRepository})
