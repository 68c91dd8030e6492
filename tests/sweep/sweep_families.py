"""Which models stand for timm: the networks that users name first, and the smallest of every architecture family."""

from __future__ import annotations

from collections.abc import Iterable

from siman_convert.model_table import Row

NAMED = (
    "resnet18", "resnet34", "resnet50", "resnext50_32x4d", "seresnet50", "wide_resnet50_2", "vgg11_bn", "densenet121",
    "regnetx_002", "regnety_002", "mobilenetv3_small_050", "mobilenetv3_large_100", "efficientnet_b0", "efficientnet_lite0",
    "convnext_atto", "repvgg_a0", "dla34", "hrnet_w18_small", "cspdarknet53",
)  # fmt: skip


def representatives(rows: Iterable[Row]) -> dict[str, str]:
    """Model -> family: NAMED, then the smallest of each family that has a convolution; of variants with something to binarize."""
    rows = [row for row in rows if row["convolutions"] and not row["name"].startswith("test_")]
    families = {row["name"]: row["family"] for row in rows}
    smallest: dict[str, str] = {}
    for row in sorted(rows, key=lambda row: (not row["binarized"], row["parameters"])):
        smallest.setdefault(row["family"], row["name"])
    chosen = dict.fromkeys([*NAMED, *smallest.values()])
    return {name: families[name] for name in chosen}
