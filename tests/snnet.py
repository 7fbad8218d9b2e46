"""What SN-Net published about its stitches: multiply-adds of each route, as its result files print them.

Pan, Cai and Zhuang 2023, "Stitchable Neural Networks" (arXiv:2302.06586), the files stitches_res*.txt of
github.com/ziplab/SN-Net. Their rules for choosing stitches are written down here once more, by the paper:
a configuration (a, b) of a stage, counted from 0, runs the source's blocks up to a and the target's from b.
"""

from __future__ import annotations

from collections.abc import Sequence

from klas_zoo.routes import Route

Pair = tuple[int, int]


def paired(depth: int) -> list[Pair]:
    """Stages of equal depth: all pairs inside windows of two blocks, each once, in the order of the windows."""
    windows = [range(start, min(start + 2, depth)) for start in range(depth)]
    return list(dict.fromkeys((a, b) for window in windows for a in window for b in window))


def forward_only(pairs: Sequence[Pair]) -> list[Pair]:
    """Of these only the pairs that skip a target block at least."""
    return [(a, b) for a, b in pairs if a < b]


def unpaired(source_depth: int, target_depth: int) -> list[Pair]:
    """Stages of different depth: target block b stands where source block floor(b · d₁ / d₂) stands."""
    pairs = [(b * source_depth // target_depth, b) for b in range(target_depth)]
    return sorted((a, b) for a, b in pairs if a < b)


def of_stages(source: Sequence[int], target: Sequence[int], stage: int) -> list[Pair]:
    """The configurations of one stage as (i, j), blocks of whole networks executed and replaced."""
    d1, d2 = source[stage], target[stage]
    pairs = forward_only(paired(d1)) if d1 == d2 else unpaired(d1, d2)
    before = sum(source[:stage]), sum(target[:stage])
    return [(before[0] + a + 1, before[1] + b) for a, b in pairs]


def stitches(source: str, target: str, pairs: Sequence[Pair], depth: int) -> list[Route]:
    return [Route.stitch(source, i, target, j, depth) for i, j in pairs]


def deit_routes() -> list[Route]:
    pairs = [(a + 1, b) for a, b in paired(12)]
    anchors = [Route.anchor(name, 12) for name in ("tiny", "small", "base")]
    return [*anchors, *stitches("tiny", "small", pairs, 12), *stitches("small", "base", pairs, 12)]


def swin_routes() -> list[Route]:
    depths = {"tiny": (2, 2, 6, 2), "small": (2, 2, 18, 2), "base": (2, 2, 18, 2)}
    routes = [Route.anchor(name, sum(found)) for name, found in depths.items()]
    for stage in range(3):
        for source, target in (("tiny", "small"), ("small", "base")):
            routes += stitches(source, target, of_stages(depths[source], depths[target], stage), 24)
    return routes


def levit_routes() -> list[Route]:
    pairs = [pair for stage in range(2) for pair in of_stages((4, 4, 4), (4, 4, 4), stage)]
    anchors = [Route.anchor(name, 12) for name in ("levit192", "levit256")]
    return [*anchors, *stitches("levit192", "levit256", pairs, 12)]


def resnet_routes() -> list[Route]:
    pairs = [pair for stage in (1, 2) for pair in of_stages((2, 2, 2, 2), (3, 4, 6, 3), stage)]
    anchors = [Route.anchor("resnet18", 8), Route.anchor("resnet50", 16)]
    return [*anchors, *stitches("resnet18", "resnet50", pairs, 16)]


def resnet_swin_routes() -> list[Route]:
    pairs = [pair for stage in (1, 2) for pair in of_stages((2, 2, 2, 2), (2, 2, 6, 2), stage)]
    anchors = [Route.anchor("resnet18", 8), Route.anchor("swin-tiny", 12)]
    return [*anchors, *stitches("resnet18", "swin-tiny", pairs, 12)]


# in the order of the configurations' numbers, anchors first; a multiply-add is one
PUBLISHED = {
    "deit": [
        1_258_411_200, 4_608_338_304, 17_582_740_224, 4_696_010_496, 4_316_862_720, 4_798_437_888, 4_419_290_112,
        4_040_142_336, 4_521_717_504, 4_142_569_728, 3_763_421_952, 4_244_997_120, 3_865_849_344, 3_486_701_568,
        3_968_276_736, 3_589_128_960, 3_209_981_184, 3_691_556_352, 3_312_408_576, 2_933_260_800, 3_414_835_968,
        3_035_688_192, 2_656_540_416, 3_138_115_584, 2_758_967_808, 2_379_820_032, 2_861_395_200, 2_482_247_424,
        2_103_099_648, 2_584_674_816, 2_205_527_040, 1_826_379_264, 2_307_954_432, 1_928_806_656, 1_549_658_880,
        2_031_234_048, 1_652_086_272, 17_961_426_432, 16_505_958_912, 18_340_574_208, 16_885_106_688, 15_429_639_168,
        17_264_254_464, 15_808_786_944, 14_353_319_424, 16_187_934_720, 14_732_467_200, 13_276_999_680, 15_111_614_976,
        13_656_147_456, 12_200_679_936, 14_035_295_232, 12_579_827_712, 11_124_360_192, 12_958_975_488, 11_503_507_968,
        10_048_040_448, 11_882_655_744, 10_427_188_224, 8_971_720_704, 10_806_336_000, 9_350_868_480, 7_895_400_960,
        9_730_016_256, 8_274_548_736, 6_819_081_216, 8_653_696_512, 7_198_228_992, 5_742_761_472, 7_577_376_768,
        6_121_909_248,
    ],
    "swin": [
        4_509_194_496, 8_768_534_784, 15_467_826_176, 8_797_436_160, 15_220_458_496, 8_797_436_160, 14_619_249_664,
        8_797_436_160, 8_442_491_136, 8_442_491_136, 8_087_546_112, 7_732_601_088, 7_732_601_088, 7_377_656_064,
        7_022_711_040, 7_022_711_040, 6_667_766_016, 6_312_820_992, 6_312_820_992, 5_957_875_968, 5_602_930_944,
        5_602_930_944, 5_247_985_920, 4_893_040_896, 14_026_420_224, 13_753_964_544, 13_481_508_864, 13_209_053_184,
        12_936_597_504, 12_664_141_824, 12_391_686_144, 12_119_230_464, 11_846_774_784, 11_574_319_104, 11_301_863_424,
        11_029_407_744, 10_756_952_064, 10_484_496_384, 10_212_040_704, 9_939_585_024, 9_667_129_344,
    ],
    "levit": [
        661_663_808, 1_133_412_864, 1_020_918_272, 977_741_824, 934_565_376, 812_300_576, 791_247_040,
        770_193_504,
    ],
    "resnet": [
        1_819_065_856, 4_111_512_576, 3_755_463_680, 3_767_505_920, 3_547_935_744, 3_134_686_208, 2_915_718_144,
        2_928_161_792, 2_709_193_728, 2_490_225_664,
    ],
    "resnet-swin": [
        1_819_065_856, 4_509_194_496, 4_095_543_552, 3_730_713_856, 3_375_768_832, 3_252_235_520, 2_897_290_496,
        2_542_345_472,
    ],
}  # fmt: skip
