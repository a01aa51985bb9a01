"""The models that others published: which files they are, how they are sampled, and what was measured of them.

What a publisher states is named in `Preset.published`; every other setting is ours. Sources: VAR is
github.com/FoundationVision/VAR (README: cfg 1.5, top-k 900, top-p 0.96), LlamaGen github.com/FoundationVision/LlamaGen
(GETTING_STARTED: cfg 2.0, 1.75 and 1.65 by size), the students github.com/microsoft/distilled_decoding
(arXiv 2412.17153: starting blocks, split, and the teacher's sampling behind the trajectories).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from distilled_decoding.distill import DistillSettings
from distilled_decoding.families.llamagen.student import StudentConfig as LlamaGenStudentConfig
from distilled_decoding.families.llamagen.tokenizer import TokenizerConfig as VQConfig
from distilled_decoding.families.llamagen.transformer import TransformerConfig as LlamaGenConfig
from distilled_decoding.families.var.student import StudentConfig as VARStudentConfig
from distilled_decoding.families.var.tokenizer import TokenizerConfig as MultiScaleConfig
from distilled_decoding.families.var.transformer import TransformerConfig as VARConfig
from distilled_decoding.flow import FlowSettings
from distilled_decoding.index import PipelineConfig
from distilled_decoding.teacher import TeacherSampling


@dataclass(frozen=True)
class PublishedFile:
    """One file of a publisher.

    Attributes:
        name: as published.
        family: whose classes it holds.
        component: `tokenizer`, `transformer` or `student`.
        config: its sizes, also those that its names and shapes do not tell.
    """

    name: str
    family: str
    component: str
    config: Any

    def difference(self, sizes: Mapping[str, Any]) -> str | None:
        """The first of these sizes, which may be a part of all or of another component, that is not this file's."""
        for name, value in sizes.items():
            if getattr(self.config, name, value) != value:
                return f"{name} is {value}, not {getattr(self.config, name)}"
        return None


@dataclass(frozen=True)
class Result:
    """A published measurement on ImageNet, 50,000 images.

    Attributes:
        method: in the words of our `sample`.
        protocol: whose evaluation it is; never compare across protocols.
        fid: Fréchet Inception distance.
        inception_score: None where none is stated.
        precision: likewise.
        recall: likewise.
    """

    method: str
    protocol: str
    fid: float
    inception_score: float | None = None
    precision: float | None = None
    recall: float | None = None


@dataclass(frozen=True)
class Preset:
    """A published teacher, and its student where one is published.

    Attributes:
        name: what `--preset` calls it.
        files: tokenizer, transformer and, where there is one, student.
        student: sizes of the student, published or not.
        image_size: pixels along a side.
        config: of the pipeline: recommended sampling, schedule and training.
        published: which settings of `config` their authors state; the others are ours.
        source: where they state them.
        results: what was published of it.
    """

    name: str
    files: tuple[PublishedFile, ...]
    student: Any
    image_size: int
    config: PipelineConfig
    published: tuple[str, ...]
    source: str
    results: tuple[Result, ...]

    def file(self, component: str) -> PublishedFile | None:
        """The file of a component, None where none is published."""
        return next((file for file in self.files if file.component == component), None)


DD1 = "Distilled Decoding, arXiv 2412.17153"
DD1_SETTINGS = "arXiv 2412.17153 and the commands of github.com/microsoft/distilled_decoding"
LLAMAGEN_SETTINGS = "GETTING_STARTED and the sampling scripts of github.com/FoundationVision/LlamaGen"
VAR_README = "VAR's README: cfg 1.5, top-k 900, top-p 0.96, OpenAI's evaluator"
LLAMAGEN_README = "LlamaGen's README: no top-k, OpenAI's evaluator, images of more than 256 px resized to 256"

SCALES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SCALES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)


def _multi_scale(patch_nums: tuple[int, ...]) -> PublishedFile:
    config = MultiScaleConfig(
        image_channels=3,
        ch=160,
        ch_mult=(1, 1, 2, 2, 4),
        num_res_blocks=2,
        z_channels=32,
        codebook_size=4096,
        patch_nums=patch_nums,
    )
    return PublishedFile("vae_ch160v4096z32.pth", "var", "tokenizer", config)


def _var_sizes(depth: int, patch_nums: tuple[int, ...], shared_aln: bool = False) -> dict[str, Any]:
    return {
        "dim": 64 * depth,
        "num_layers": depth,
        "num_heads": depth,
        "vocab_size": 4096,
        "code_dim": 32,
        "patch_nums": patch_nums,
        "num_classes": 1000,
        "shared_aln": shared_aln,
    }


def _var(name: str, depth: int, results: tuple[Result, ...], distilled: bool, size: int = 256) -> Preset:
    sizes = _var_sizes(depth, SCALES_256 if size == 256 else SCALES_512, shared_aln=size == 512)
    files = [
        _multi_scale(sizes["patch_nums"]),
        PublishedFile(f"var_d{depth}.pth", "var", "transformer", VARConfig(**sizes)),
    ]
    student = VARStudentConfig(**sizes)
    if distilled:
        files.append(PublishedFile(f"VAR-DD/var-d{depth}.pth", "var", "student", student))
    second = 5 if depth == 16 else 4
    config = PipelineConfig(
        family="var",
        class_names=tuple(map(str, range(1000))),
        # VAR's own `cfg` counts from 0 on: 2.0 is the scale 3 at the last block.
        sampling=TeacherSampling(3.0 if distilled else 2.5, "linear", top_k=900, top_p=0.95 if distilled else 0.96),
        flow=FlowSettings(),
        start_blocks=(0, second),
        split_block=second,
        micro_batch=8,
        num_trajectories=1_000_000,
        training=_training(1e-4 if depth < 24 else 5e-5),
        preset=name,
    )
    published = ("sampling", "start_blocks", "split_block") if distilled else ("sampling",)
    source = DD1_SETTINGS if distilled else VAR_README
    return Preset(name, tuple(files), student, size, config, published, source, results)


def _training(learning_rate: float) -> DistillSettings:
    """Ours: no training setting of the published students is stated anywhere."""
    return DistillSettings(
        num_updates=200_000,
        batch_size=256,
        learning_rate=learning_rate,
        warmup=2_000,
        ema_rate=0.9999,
    )


def _vq(name: str, ch_mult: tuple[int, ...]) -> PublishedFile:
    config = VQConfig(
        image_channels=3,
        ch=128,
        encoder_ch_mult=ch_mult,
        decoder_ch_mult=ch_mult,
        num_res_blocks=2,
        z_channels=256,
        codebook_size=16384,
        code_dim=8,
    )
    return PublishedFile(name, "llamagen", "tokenizer", config)


_SIZES = {"B": (12, 12, 768), "L": (24, 16, 1024), "XL": (36, 20, 1280), "XXL": (48, 24, 1536), "3B": (24, 32, 3200)}
"""Layers, heads and width."""


def _llamagen_sizes(size: str, num_tokens: int, **condition: int) -> dict[str, Any]:
    layers, heads, dim = _SIZES[size]
    sizes = {"dim": dim, "num_layers": layers, "num_heads": heads, "vocab_size": 16384, "num_tokens": num_tokens}
    return sizes | (condition or {"num_classes": 1000})


def _llamagen(
    name: str, size: str, image_size: int, guidance: float, results: tuple[Result, ...], split_block: int | None = None
) -> Preset:
    """`split_block`: that of the published student; None where there is none."""
    sizes = _llamagen_sizes(size, (image_size // 16) ** 2)
    file = f"c2i_{size}_{image_size}.pt"
    files = [VQ_16_C2I, PublishedFile(file, "llamagen", "transformer", LlamaGenConfig(**sizes))]
    student = LlamaGenStudentConfig(**sizes, code_dim=8)
    if split_block is not None:
        files.append(PublishedFile(f"LlamaGen-DD/llamagen-{size}.pt", "llamagen", "student", student))
    sampling = TeacherSampling(guidance, top_k=0 if split_block is None else 8000)
    published = ("sampling",) if split_block is None else ("sampling", "start_blocks", "split_block")
    config = _raster_config(name, sizes, sampling, split_block)
    source = LLAMAGEN_SETTINGS if split_block is None else DD1_SETTINGS
    return Preset(name, tuple(files), student, image_size, config, published, source, results)


def _llamagen_text(stage: int, image_size: int) -> Preset:
    name = f"llamagen-t2i-stage{stage}"
    sizes = _llamagen_sizes("XL", (image_size // 16) ** 2, num_classes=0, caption_tokens=120, caption_dim=2048)
    file = PublishedFile(f"t2i_XL_stage{stage}_{image_size}.pt", "llamagen", "transformer", LlamaGenConfig(**sizes))
    student = LlamaGenStudentConfig(**sizes, code_dim=8)
    config = _raster_config(name, sizes, TeacherSampling(7.5, top_k=1000), None)
    config = replace(config, text_encoder="google/flan-t5-xl")
    return Preset(name, (VQ_16_T2I, file), student, image_size, config, ("sampling",), LLAMAGEN_SETTINGS, ())


def _raster_config(
    name: str, sizes: dict[str, Any], sampling: TeacherSampling, split_block: int | None
) -> PipelineConfig:
    # The published students start again after 80 of 256 tokens; ours after the same share of any other grid.
    second = sizes["num_tokens"] * 80 // 256
    return PipelineConfig(
        family="llamagen",
        class_names=tuple(map(str, range(sizes["num_classes"]))),
        sampling=sampling,
        flow=FlowSettings(),
        start_blocks=(0, second),
        split_block=second if split_block is None else split_block,
        micro_batch=8,
        num_trajectories=1_000_000,
        training=_training(1e-4 if sizes["dim"] < 1536 else 5e-5),
        preset=name,
    )


VQ_16_C2I = _vq("vq_ds16_c2i.pt", (1, 1, 2, 2, 4))
VQ_16_T2I = _vq("vq_ds16_t2i.pt", (1, 1, 2, 2, 4))
VQ_8_C2I = _vq("vq_ds8_c2i.pt", (1, 2, 2, 4))

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        _var(
            "var-d16",
            16,
            (
                Result("--steps teacher-ancestral", VAR_README, 3.55),
                Result("--steps teacher-ancestral", DD1, 4.19, 230, 0.84, 0.48),
                Result("--steps 1", DD1, 9.94, 193.6, 0.80, 0.37),
                Result("--steps 2", DD1, 7.82, 197.0, 0.80, 0.41),
                Result("--schedule 0 5 --teacher-span 4 5 --split-block 5 --prefix unmasked", DD1, 6.54),
                Result("--schedule 0 5 --teacher-span 3 5 --split-block 8 --prefix unmasked", DD1, 5.47),
                Result("--schedule 0 5 --teacher-span 0 5 --split-block 9", DD1, 5.03),
            ),
            distilled=True,
        ),
        _var(
            "var-d20",
            20,
            (
                Result("--steps teacher-ancestral", VAR_README, 2.95),
                Result("--steps teacher-ancestral", DD1, 3.35, 301, 0.84, 0.51),
                Result("--steps 1", DD1, 9.55, 197.2),
                Result("--steps 2", DD1, 7.33, 204.5),
            ),
            distilled=True,
        ),
        _var(
            "var-d24",
            24,
            (
                Result("--steps teacher-ancestral", VAR_README, 2.33),
                Result("--steps teacher-ancestral", DD1, 2.51, 312, 0.82, 0.53),
                Result("--steps 1", DD1, 8.92, 202.8),
                Result("--steps 2", DD1, 6.95, 222.5),
            ),
            distilled=True,
        ),
        _var("var-d30", 30, (Result("--steps teacher-ancestral", VAR_README, 1.97),), distilled=False),
        _var("var-d36", 36, (Result("--steps teacher-ancestral", VAR_README, 2.63),), distilled=False, size=512),
        _llamagen(
            "llamagen-b",
            "B",
            256,
            2.0,
            (
                Result("--steps teacher-ancestral", LLAMAGEN_README, 5.46),
                Result("--steps teacher-ancestral", DD1, 5.42, 193.5, 0.83, 0.44),
                Result("--steps 1", DD1, 15.50, 135.4, 0.76, 0.26),
                Result("--steps 2", DD1, 11.17, 154.8, 0.80, 0.31),
            ),
            split_block=80,
        ),
        _llamagen(
            "llamagen-l",
            "L",
            256,
            2.0,
            (
                Result("--steps teacher-ancestral", LLAMAGEN_README, 3.80),
                Result("--steps teacher-ancestral", DD1, 4.11, 283.5, 0.85, 0.48),
                Result("--steps 1", DD1, 11.35, 193.6, 0.81, 0.30),
                Result("--steps 2", DD1, 7.58, 237.5, 0.84, 0.37),
                Result("--schedule 0 80 --teacher-span 60 80 --split-block 180", DD1, 6.76),
                Result("--schedule 0 80 --teacher-span 40 80 --split-block 180", DD1, 6.20),
                Result("--schedule 0 80 --teacher-span 0 80 --split-block 220", DD1, 5.71),
            ),
            split_block=130,
        ),
        _llamagen("llamagen-b-384", "B", 384, 2.0, (Result("--steps teacher-ancestral", LLAMAGEN_README, 6.09),)),
        _llamagen("llamagen-l-384", "L", 384, 2.0, (Result("--steps teacher-ancestral", LLAMAGEN_README, 3.07),)),
        _llamagen("llamagen-xl-384", "XL", 384, 1.75, (Result("--steps teacher-ancestral", LLAMAGEN_README, 2.62),)),
        _llamagen("llamagen-xxl-384", "XXL", 384, 1.75, (Result("--steps teacher-ancestral", LLAMAGEN_README, 2.34),)),
        _llamagen("llamagen-3b-384", "3B", 384, 1.65, (Result("--steps teacher-ancestral", LLAMAGEN_README, 2.18),)),
        _llamagen_text(1, 256),
        _llamagen_text(2, 512),
    )
}

FILES: tuple[PublishedFile, ...] = tuple(
    dict.fromkeys([file for preset in PRESETS.values() for file in preset.files] + [VQ_8_C2I])
)
"""Every published file; VAR's tokenizer twice, for it serves two image sizes."""


def preset(name: str) -> Preset:
    """A published model by name.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
