"""What `import fastmaml` says where it cannot work."""

import shutil
import subprocess
import sys
from pathlib import Path

import fastmaml


def test_a_source_folder_without_the_core_says_what_to_do(tmp_path):
    package = tmp_path / "fastmaml"
    package.mkdir()
    shutil.copy(Path(fastmaml.__file__), package)
    command = [sys.executable, "-S", "-c", "import fastmaml"]  # -S: without the installed one
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    message = run.stderr.splitlines()[-1]
    assert message.startswith(f"ImportError: fastmaml's native core is not usable in {package}; ")
    assert "pip install -e ." in message
