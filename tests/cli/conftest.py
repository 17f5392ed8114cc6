"""Tiny real bundles."""

from support.bundles import (
    build,
    bundle,
    staged,
    tint,
    tinted,
    tinting,
    two_folder_bundle,
    two_folders,
    weights_dir,
)

__all__ = [
    "build",
    "bundle",
    "staged",
    "tint",
    "tinted",
    "tinting",
    "two_folder_bundle",
    "two_folders",
    "weights_dir",
]
