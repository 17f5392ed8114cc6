"""Every image of a folder. Damaged ones stop nothing. A second run goes on where the first was stopped.

python examples/batch_folder.py BUNDLE IN OUT
"""

import sys
from pathlib import Path

from tilewright.runtime import load
from tilewright.runtime.folder import images_of, restore_images

bundle, source, target = map(Path, sys.argv[1:])
pairs, others = images_of(source, target, "png")
print(f"{len(pairs)} images, {others} other files")
with load(bundle) as restorer:
    outcomes = restore_images(restorer, pairs, resume=True, keep_every_s=900)
for outcome in outcomes:
    print(outcome.source.name, outcome.error or ("done before" if outcome.finished else outcome.size))
sys.exit(any(outcome.error for outcome in outcomes))
