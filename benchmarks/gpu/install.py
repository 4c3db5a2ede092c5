"""Install wheels from a directory for packages that are missing or older: install.py WHEELS TARGET.

Torch, and what it brings, are never installed: those of the machine fit its driver.
"""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pip._vendor.packaging.utils import parse_wheel_filename
from pip._vendor.packaging.version import Version

OF_THE_MACHINE = ("torch", "triton", "nvidia-")


def is_needed(wheel: Path) -> bool:
    """Whether the machine lacks this package, or has an older one."""
    name, offered, *_ = parse_wheel_filename(wheel.name)
    if name.startswith(OF_THE_MACHINE):
        return False
    try:
        return Version(version(name)) < Version(str(offered))
    except PackageNotFoundError:
        return True


def main() -> None:
    wheels, target = map(Path, sys.argv[1:])
    needed = [str(wheel) for wheel in sorted(wheels.glob("*.whl")) if is_needed(wheel)]
    if needed:
        print(f"installing {len(needed)} wheels:", *(Path(name).name for name in needed))
        options = ["--quiet", "--no-index", "--no-deps", "--disable-pip-version-check"]
        pip = [sys.executable, "-m", "pip", "install", *options]
        subprocess.run([*pip, "--target", str(target), *needed], check=True)


if __name__ == "__main__":
    main()
