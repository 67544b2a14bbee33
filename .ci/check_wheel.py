"""Check that a wheel has the library with its types, and nothing else.

Called with the wheel's path.
"""

import sys
from pathlib import Path
from zipfile import ZipFile

LIBRARY = Path(__file__).parents[1] / "laplace_debiased"

names = {name for name in ZipFile(sys.argv[1]).namelist() if ".dist-info/" not in name}
sources = {*LIBRARY.rglob("*.py"), LIBRARY / "py.typed"}
expected = {path.relative_to(LIBRARY.parent).as_posix() for path in sources}
if names != expected:
    sys.exit(f"Missing or not expected in the wheel: {sorted(names ^ expected)}")
print(f"The wheel has the {len(names)} files of the library.")
