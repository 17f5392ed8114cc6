"""seal: the complete bundle, which replaces an older one in one step."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from tilewright.export.build.assembly import Assembly
from tilewright.export.build.cache import Stage, write
from tilewright.export.build.card import card
from tilewright.export.build.code import code
from tilewright.export.build.stages.verify import REPORT
from tilewright.export.build.versions import version
from tilewright.runtime.bundle.measured import remember
from tilewright.runtime.bundle.write import seal

__all__ = ["stage"]


def stage(assembly: Assembly, before: Mapping[str, Stage]) -> Stage:
    """The stage; its inputs are the keys of all stages before."""
    inputs = {name: stage.key for name, stage in before.items()} | {"version": version("tilewright")}
    inputs |= {"tiles": str((assembly.request.tiles, assembly.request.batches))}
    inputs |= {"precisions": ",".join(assembly.request.precisions)}
    inputs |= {"preset": str(assembly.request.preset), "licence": assembly.request.licence}
    inputs |= code(__name__, assembly.request.system.module)
    verified = before["verify"].directory if "verify" in before else None
    return Stage("seal", inputs, lambda folder: _work(assembly, verified, folder))


def _work(assembly: Assembly, verified: Path | None, folder: Path) -> None:
    from tilewright.export.verify.gate import measurement

    request, report = assembly.request, None
    (folder / "reports").mkdir(exist_ok=True)
    if verified is not None and (verified / REPORT).is_file():
        shutil.copyfile(verified / REPORT, folder / "reports" / REPORT)
        report = json.loads((verified / REPORT).read_text())
        remember(folder, measurement(report))
    manifest = assembly.assemble(folder, "yes" if report else "no")
    for name, weights in assembly.weights().folders.items():
        if weights.path is None:
            shutil.copytree(assembly.attached / "weights" / name, folder / "weights" / name)
    shutil.copyfile(assembly.attached / "accounts.json", folder / "reports" / "weights.json")
    shutil.copyfile(assembly.optimised / "nodes.json", folder / "reports" / "nodes.json")
    write(folder / "README.md", card(request, manifest, report))
    seal(folder, manifest, request.out)
