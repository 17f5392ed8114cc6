"""Run every benchmark and store its JSON, with hardware and versions beside, under bench/results/.

Needs about 5 GB of disk in --work and an otherwise idle machine.
"""

import argparse
import importlib.metadata
import json
import shutil
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path

from tilewright.runtime.profile import hardware

HERE = Path(__file__).parent
PACKAGES = ("torch", "onnxruntime", "onnx", "onnxscript", "onnx-ir", "transformers", "numpy", "pillow")


def tilewright(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "tilewright.export.cli", *map(str, words)], check=True, stdout=sys.stderr)


def bench(name: str, *words: object) -> None:
    print(f"{name} ...", file=sys.stderr, flush=True)
    printed = subprocess.run(
        [sys.executable, HERE / f"{name}.py", *map(str, words)], check=True, stdout=subprocess.PIPE
    )
    store(name, json.loads(printed.stdout))


def store(name: str, found: object) -> None:
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    record = {"hardware": hardware(), "versions": versions, "python": sys.version.split()[0], "result": found}
    record["when"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    text = json.dumps(record, indent=1, sort_keys=True)
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / f"{name}.json").write_text(text + "\n")
    print(text)


def accuracy(bundle: Path, size: int) -> dict[str, object]:
    words = [sys.executable, "-m", "tilewright.export.cli", "export", "verify", bundle, "--size", str(size), "--json"]
    report: dict[str, object] = json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout)
    return report


def main(work: Path) -> None:
    tiny, full, again = work / "tiny", work / "full", work / "again"
    tilewright("export", "build", "hitoksr", "--preset", "tiny", "--random-weights", 0, "-o", tiny)
    tilewright("export", "build", "hitoksr", "--preset", "full", "--random-weights", 0, "-o", full)
    bench("imports")
    bench("overhead", "--bundle", tiny)
    shutil.rmtree(again, ignore_errors=True)
    shutil.rmtree(again.with_suffix(".cache"), ignore_errors=True)
    bench("export_cost", "--weights", full / "weights", "--out", again)
    store("accuracy", {"tiny at 512x512": accuracy(tiny, 512), "full at 512x512": accuracy(full, 512)})
    bench("latency", "--bundle", full, "--work", work)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "tilewright-bench")
    main(parser.parse_args().work)
