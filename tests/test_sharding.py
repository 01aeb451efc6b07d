"""Many devices, as eight that XLA makes of the CPU: the tests are in `eight_devices.py`."""

import subprocess
import sys
from pathlib import Path

import conftest


def test_eight_devices():
    file = Path(__file__).parent / "eight_devices.py"
    environment = conftest.with_xla_flags(conftest.command_environment(), "--xla_force_host_platform_device_count=8")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
        capture_output=True, text=True, timeout=600, env=environment, cwd=file.parent.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout
