"""The pipeline: a teacher, its student, and everything needed to turn labels or prompts, and seeds, into images.

Axis letters: B batch, L tokens in a sequence, C code or image channels, H W image.
"""

import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from copy import copy, deepcopy
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from distilled_decoding.card import model_card
from distilled_decoding.checkpoint import PROMPTS, fingerprint, load_json, save_json, save_text, sha256
from distilled_decoding.compiling import compiled
from distilled_decoding.condition import Asked, Classes, Condition, ConditionTable, Labels
from distilled_decoding.convert import read_parts
from distilled_decoding.families import family
from distilled_decoding.hub import create_repository, is_id, upload
from distilled_decoding.images import to_pil, to_uint8
from distilled_decoding.index import INDEX, LIBRARY, PipelineConfig, match_components, match_student, match_teacher
from distilled_decoding.noise import image_keys
from distilled_decoding.originals import Weights
from distilled_decoding.prompts import EncodedPrompts, prompt_table, read_prompts
from distilled_decoding.sampling import Callback, Passes, Plan, check_plan, sample, spread_schedule
from distilled_decoding.student import Head
from distilled_decoding.teacher import Prefix
from distilled_decoding.text import ENCODER, TOKENIZER, TextEncoder
from distilled_decoding.zoo import resolve

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Steps = int | Literal["teacher", "teacher-ancestral"]
Format = Literal["pil", "array", "tensor", "codes"]

Conditions = Condition | Asked
"""What the images of a run are asked for: all at once, or read from a table a batch at a time."""

Codes = Callable[[Condition, Tensor], Tensor]
"""A way to make codes [B, L, C] of a batch: from its conditions and its keys."""


@dataclass(frozen=True)
class Output:
    """What a pipeline call returns.

    Attributes:
        images: one per label or prompt, as asked for: a list of PIL images, grey or RGB; a uint8 array [N, H, W, C]; a
            float32 tensor [N, C, H, W] in [-1, 1] on the CPU; None where only codes were.
        code_BLC: their codes, on the CPU.
    """

    images: Any
    code_BLC: Tensor


class Pipeline:
    """A teacher with its student, as loaded from a folder.

    Args:
        teacher: the model.
        student: distilled from it, or None.
        config: what its folder says of it.
        text_encoder: of a model of captions, what its folder is to hold; None where `config` names one, or there is
            none.
        prompts: of a model of captions, those that it is shown by when no others are given.

    Raises:
        ValueError: a text encoder, while `config` names one.
    """

    def __init__(
        self,
        teacher: Any,
        student: Any | None,
        config: PipelineConfig,
        text_encoder: TextEncoder | None = None,
        prompts: Sequence[str] = (),
    ) -> None:
        if text_encoder is not None and config.text_encoder is not None:
            raise ValueError(f"a text encoder is given and {config.text_encoder!r} is named; leave one of them out")
        self.teacher = teacher
        self.student = student
        self.config = config
        self.prompts = tuple(prompts)
        self._own_text: TextEncoder | Path | None = text_encoder
        self._passes = Passes()
        self.is_compiled = False

    @classmethod
    def from_pretrained(cls, model: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> "Pipeline":
        """Load a shipped name, a folder or a hub id.

        Args:
            model: the name, the folder or the id.
            device: where the models go.
            dtype: of the transformers; see `cast`.

        Raises:
            ValueError: there is no such model, or it is incomplete or damaged, or its parts do not fit together.
        """
        folder = resolve(model)
        index = load_json(folder / INDEX)
        config = PipelineConfig.from_json(index, folder / INDEX)
        reader = family(config.family)
        match_components(index, reader, folder / INDEX)
        teacher = reader.load_teacher(folder).to(device).eval().requires_grad_(False)
        match_teacher(config, teacher, folder / INDEX)
        student = None
        if "student" in index:
            student = reader.load_student(folder).to(device).eval().requires_grad_(False)
            match_student(student, teacher, folder / "student")
        own = folder / PROMPTS
        pipeline = cls(teacher, student, config, prompts=read_prompts(own) if own.is_file() else ())
        pipeline._own_text = folder if (folder / ENCODER).is_dir() else None
        pipeline.cast(dtype)
        return pipeline

    @classmethod
    def from_original(
        cls,
        paths: Sequence[str | Path],
        preset: str | None = None,
        weights: Weights | None = None,
        allow_namespace: bool = False,
        device: str = "cpu",
        **sizes: Any,
    ) -> "Pipeline":
        """Load files as their publishers wrote them: a tokenizer, a transformer and, if wanted, a student.

        What they are is told from names and shapes; see docs/published-models.md.

        Args:
            paths: the files, in any order.
            preset: which published model it is, where the files alone fit several.
            weights: averaged (`ema`) or `raw`, of a file that holds both; None takes those that the publisher's own
                scripts take.
            allow_namespace: also read training checkpoints that hold an `argparse.Namespace`.
            device: where the models go.
            sizes: what neither the files nor a preset tell: `num_heads`, `num_tokens` or `patch_nums`.

        Raises:
            ValueError: a file is not what it should be, the files do not belong together, or something is not told.
        """
        if isinstance(paths, str | Path):
            raise ValueError(f"paths must be several files, a tokenizer's and a transformer's at least, got {paths!r}")
        parts = read_parts([Path(path) for path in paths], preset, weights, allow_namespace, **sizes)
        teacher, student = parts.teacher.to(device), parts.student
        match_teacher(parts.config, teacher, "these files")
        if student is not None:
            match_student(student.to(device), teacher, "the student's file")
        return cls(teacher, student, parts.config)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write a folder that `from_pretrained` reads.

        The index goes last, so half a folder is never taken for a whole one. A `README.md` that lies there stays;
        where there is none, a model card is written.

        Args:
            folder: made when it is not there.
            dtype: of the stored weights; float16 halves the files but may round the teacher to another one.
        """
        folder, reader = Path(folder), family(self.config.family)
        components = reader.class_names(student=self.student is not None)
        reader.save_teacher(folder, self.teacher, dtype)
        if self.student is not None:
            reader.save_student(folder, self.student, dtype)
        self._save_text(folder)
        if not (folder / "README.md").exists():
            save_text(folder / "README.md", model_card(self, folder.resolve().name))
        index: dict[str, Any] = {"_class_name": "Pipeline", **asdict(self.config)}
        index |= {name: [LIBRARY, kind] for name, kind in components.items()}
        files = [f"{name}/model.safetensors" for name in (*components, ENCODER)]
        index["sha256"] = {name: sha256(folder / name) for name in files if (folder / name).is_file()}
        save_json(folder / INDEX, index)

    def _save_text(self, folder: Path) -> None:
        """Write the text encoder, unless it goes by a name, and the prompts."""
        own = self._own_text if self.config.text_encoder is None else None
        if isinstance(own, TextEncoder):
            own.save_pretrained(folder)
        elif own is not None and own.resolve() != folder.resolve():
            # Files are copied as they are, which needs no transformers.
            for name in (ENCODER, TOKENIZER):
                shutil.copytree(own / name, folder / name, dirs_exist_ok=True)
        if self.prompts:
            save_text(folder / PROMPTS, "".join(f"{prompt}\n" for prompt in self.prompts))

    def push_to_hub(
        self, repo_id: str, private: bool = False, token: str | None = None, dtype: torch.dtype = torch.float32
    ) -> str:
        """Upload to the Hugging Face hub, with a model card where the repository has none.

        Args:
            repo_id: `owner/name`; made when it is not there.
            private: whether a new repository is for its owner alone.
            token: with the right to write; None takes that of `hf auth login`.
            dtype: see `save_pretrained`.

        Returns:
            The repository's address.

        Raises:
            ValueError: the id is no `owner/name`, the text encoder lies in a folder of its own, or the hub refuses or
                does not answer.
        """
        named = self.config.text_encoder
        if named is not None and not is_id(named):
            way_out = "name one on the hub first, with_settings(text_encoder='owner/name')"
            raise ValueError(f"the text encoder lies in {named}, where nobody else will find it; {way_out}")
        address = create_repository(repo_id, private, token)
        with TemporaryDirectory() as temporary:
            # The card goes first: `save_pretrained` would name it after this folder.
            save_text(Path(temporary, "README.md"), model_card(self, repo_id))
            self.save_pretrained(temporary, dtype)
            upload(Path(temporary), repo_id, token)
        return address

    def compiled(self) -> "Pipeline":
        """The same models with every computation of sampling compiled: the same images up to rounding, made faster.

        The first images of each plan and batch size take a minute or more. A compiled teacher makes one batch at a
        time. See `compiling.compiled` for what compiling assumes.

        Raises:
            ValueError: torch is too old.
        """
        if self.is_compiled:
            return self
        # Asked of the compiled decoder, a single image would get a graph of its own.
        _ = self.image_shape
        # The weights are shared; what is compiled takes the place of a method, in the copy alone.
        twin = copy(self)
        twin.teacher = copy(self.teacher)
        models = [self.teacher] if self.student is None else [self.teacher, self.student]
        num_parameters = sum(parameter.numel() for model in models for parameter in model.parameters())
        compiler = partial(compiled, device=self.device, num_parameters=num_parameters)
        twin._passes = Passes(*(compiler(getattr(self._passes, field.name)) for field in fields(Passes)))
        twin.is_compiled = True
        if hasattr(twin.teacher, "compile_steps"):
            twin.teacher.compile_steps(compiler)
        return twin

    def cast(self, dtype: torch.dtype) -> None:
        """Give the weights another dtype, in place; tokenizer and text encoder stay in float32.

        Codes must be exact, and T5 overflows.

        Raises:
            ValueError: a dtype that is not one of `DTYPES`, or the pipeline is compiled already.
        """
        if self.is_compiled:
            raise ValueError("what is compiled does not see new weights; cast first, then compile")
        if dtype not in DTYPES.values():
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
        for part in self._transformers():
            part.to(dtype)
        if self.student is not None:
            self.student.to(dtype)
        for name in ("fingerprint", "student_fingerprint"):
            self.__dict__.pop(name, None)

    def with_settings(self, **settings: Any) -> "Pipeline":
        """The same models with other settings, fields of `PipelineConfig`.

        Raises:
            ValueError: settings outside their range, or that the teacher's blocks do not allow.
        """
        twin = copy(self)
        twin.config = replace(self.config, **settings)
        if "text_encoder" in settings:
            twin.__dict__.pop("text_encoder", None)
        match_teacher(twin.config, self.teacher, "these settings")
        return twin

    def with_student(self, student: nn.Module, start_blocks: tuple[int, ...], split_block: int) -> "Pipeline":
        """The same teacher with another student, which is nobody's published one.

        Raises:
            ValueError: the pipeline is compiled.
        """
        if self.is_compiled:
            raise ValueError("what is compiled keeps its student; take the pipeline as it was before")
        twin = copy(self)
        twin.student = student
        twin.config = replace(self.config, start_blocks=start_blocks, split_block=split_block, preset=None)
        twin.__dict__.pop("student_fingerprint", None)
        return twin

    def new_student(self, seed: int, head: Head = "code") -> nn.Module:
        """An untrained student that begins where the teacher stands, on its device.

        Raises:
            ValueError: a head that students of this family do not have.
        """
        return family(self.config.family).new_student(self.teacher, seed, head)

    def new_tracker(self) -> nn.Module:
        """A copy of the teacher whose transformers can be trained, and its tokenizer not."""
        twin = copy(self)
        twin.teacher = deepcopy(self.teacher)
        for part in twin._transformers():
            part.requires_grad_(True)
        return twin.teacher

    @cached_property
    def text_encoder(self) -> TextEncoder | None:
        """What turns prompts into captions, loaded when it is first asked for; None where there is none.

        Raises:
            ValueError: it cannot be loaded, or gives captions of another size than the teacher reads.
        """
        source = self.config.text_encoder or self._own_text
        if self.num_classes or source is None:
            return None
        if isinstance(source, TextEncoder):
            return source
        tokens, width = self.teacher.caption_shape
        encoder = TextEncoder.from_pretrained(source, tokens, str(self.device))
        if encoder.width != width:
            raise ValueError(f"{source} gives features of {encoder.width} channels, but this model reads {width}")
        return encoder

    @property
    def text_source(self) -> str | None:
        """Where the text encoder is from: a name, or `in the folder`; None where there is none."""
        return self.config.text_encoder or (None if self._own_text is None else "in the folder")

    def drop_text_encoder(self) -> None:
        """Let go of the text encoder, which is loaded again when it is next asked for."""
        self.__dict__.pop("text_encoder", None)

    def require_text_encoder(self) -> TextEncoder:
        """The text encoder, for a job that needs it.

        Raises:
            ValueError: this model reads classes, or has none; see also `text_encoder`.
        """
        self._check_reads_text()
        if self.text_encoder is None:
            raise ValueError("this model has no text encoder: name one in `convert --text-encoder NAME`")
        return self.text_encoder

    def table(self, prompts: Path | Sequence[str] | None = None, column: str | None = None) -> ConditionTable:
        """What images can be asked for, by number: the classes, or prompts.

        Args:
            prompts: of a model of captions: a folder that `encode-prompts` made, or what `texts` takes.
            column: see `texts`.

        Raises:
            ValueError: prompts for a model of classes, or of another size than this model reads; see also `texts`.
        """
        if self.num_classes and prompts is None and column is None:
            return Classes(self.num_classes)
        if isinstance(prompts, Path) and prompts.is_dir():
            if column is not None:
                raise ValueError(f"{prompts} is a folder, which has no columns; leave the column {column!r} out")
            return self.encoded(prompts)
        texts = self.texts(prompts, column)
        return prompt_table(self.require_text_encoder(), texts)

    def encoded(self, folder: Path) -> EncodedPrompts:
        """A folder of encoded prompts, for this model.

        Raises:
            ValueError: this model reads classes, or captions of another size, or the folder holds something else.
        """
        self._check_reads_text()
        table = EncodedPrompts.open(folder)
        found, expected = (table.manifest["max_tokens"], table.manifest["width"]), self.teacher.caption_shape
        if found != expected:
            raise ValueError(f"{folder} holds captions of [tokens, channels] {found}, but this model reads {expected}")
        return table

    def texts(self, prompts: Path | Sequence[str] | None = None, column: str | None = None) -> list[str]:
        """The prompts that a user gave, or the model's own.

        Args:
            prompts: a file, see `read_prompts`, or the texts themselves; None means the model's own.
            column: of the prompts in a .csv or .parquet file.

        Raises:
            ValueError: this model reads classes; a file that cannot be read, one text in place of several, or none
                where the model has none.
        """
        self._check_reads_text()
        if isinstance(prompts, Path):
            return read_prompts(prompts, column)
        if column is not None:
            raise ValueError(f"column {column!r} goes with a .csv or .parquet file of prompts")
        if isinstance(prompts, str):
            raise ValueError(f"prompts must be several texts, got one string, {prompts!r}; put it into a list")
        if prompts is None and not self.prompts:
            raise ValueError("this model ships no prompts of its own: give some, or a file or folder (--prompts)")
        return list(self.prompts if prompts is None else prompts)

    def labels(self, labels: Sequence[int]) -> Labels:
        """Labels that a user gave.

        Raises:
            ValueError: this model reads prompts; see also `Labels.checked`.
        """
        if not self.num_classes:
            raise ValueError("this model reads prompts, not labels: give texts (--prompt)")
        return Labels.checked(labels, self.num_classes)

    def _check_reads_text(self) -> None:
        if self.num_classes:
            way_out = f"give labels in 0..{self.num_classes - 1}, or leave --prompts out"
            raise ValueError(f"this model reads classes, not prompts: {way_out}")

    def _transformers(self) -> list[nn.Module]:
        """The teacher's components but the tokenizer."""
        names = family(self.config.family).components
        return [getattr(self.teacher, name) for name in names if name != "tokenizer"]

    @property
    def dtype(self) -> torch.dtype:
        """Of the transformers' weights."""
        return next(parameter.dtype for part in self._transformers() for parameter in part.parameters())

    @cached_property
    def device(self) -> torch.device:
        """Where the models are."""
        return self.teacher.codebook.device

    @property
    def num_classes(self) -> int:
        """Number of labels."""
        return self.teacher.num_classes

    @cached_property
    @torch.no_grad()
    def image_shape(self) -> tuple[int, ...]:
        """Channels, height and width of an image."""
        code_1LC = self.teacher.codebook[:1].expand(1, self.teacher.order.length, -1)
        return tuple(self.teacher.decode(code_1LC).shape[1:])

    @property
    def head(self) -> Head:
        """Which head the student has."""
        return family(self.config.family).head(self.student)

    @cached_property
    def student_fingerprint(self) -> str:
        """A hash of the student's weights."""
        assert self.student is not None
        return fingerprint(self.student)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the teacher's weights; trajectories and measurements carry it."""
        return fingerprint(self.teacher)

    def plan(
        self,
        steps: Steps | None = None,
        schedule: Sequence[int] | None = None,
        teacher_span: tuple[int, int] | None = None,
        prefix: Prefix = "causal",
        refine: int = 0,
    ) -> Plan:
        """How to sample: student steps, an explicit schedule, or the teacher alone.

        Args:
            steps: number of student steps, spread over its starting blocks; `teacher` maps the image's own
                noise through the teacher, `teacher-ancestral` samples from it. None is 1, or leaves it to `schedule`.
            schedule: starting blocks, instead of `steps`.
            teacher_span: blocks a..b-1 that the teacher predicts in between.
            prefix: how the teacher reads the blocks before its span: `causal`, as in its own generation, or
                `unmasked`, as VAR's published results with the teacher in between were made.
            refine: passes of the teacher over all blocks at once, behind the student's steps.

        Raises:
            ValueError: the plan cannot be carried out.
        """
        if prefix not in get_args(Prefix):
            raise ValueError(f"unknown prefix {prefix!r}; choose one of {', '.join(get_args(Prefix))}")
        if prefix == "unmasked" and (teacher_span is None or not hasattr(self.teacher, "start_unmasked")):
            raise ValueError("an unmasked prefix goes with a teacher span, of a teacher that masks its prefix: VAR's")
        if schedule is not None and steps is not None:
            raise ValueError(f"give steps or a schedule, not both: got {steps} and {tuple(schedule)}")
        if isinstance(steps, str):
            if steps not in ("teacher", "teacher-ancestral"):
                raise ValueError(f"steps must be a number, teacher or teacher-ancestral, got {steps!r}")
            if teacher_span is not None:
                raise ValueError(f"teacher span {teacher_span} goes with student steps, not with steps={steps!r}")
            plan = Plan((), ancestral=steps == "teacher-ancestral", refine=refine)
            return check_plan(plan, self.teacher.order, self.config.start_blocks)
        if self.student is None:
            raise ValueError("this model has no student yet: sample with steps teacher, or make one with `distill`")
        starts, config = self.config.start_blocks, self.config
        if self.head == "flow" and (
            config.student_temperature > 0 or config.split_block < self.teacher.order.num_blocks
        ):
            raise ValueError(
                "the flow map alone takes this student's noise to tokens: leave out student_temperature "
                f"(it is {config.student_temperature:g}) and split_block (it is {config.split_block})"
            )
        if schedule is None:
            blocks = spread_schedule(1 if steps is None else steps, starts)
        else:
            blocks = self.teacher.order.check_schedule(schedule, starts)
        return check_plan(Plan(blocks, teacher_span, prefix=prefix, refine=refine), self.teacher.order, starts)

    def codes(self, plan: Plan, condition: Condition, key_B: Tensor, callback: Callback | None = None) -> Tensor:
        """The codes [B, L, C] of one batch of images."""
        return sample(
            plan,
            self.teacher,
            self.student,
            condition.to(self.device),
            key_B.to(self.device),
            self.config.sampling,
            self.config.flow,
            self.config.split_block,
            callback,
            self._passes,
            self.config.student_temperature,
        )

    def images(
        self, plan: Plan, condition: Conditions, key_B: Tensor, callback: Callback | None = None
    ) -> Iterator[Tensor]:
        """Images as uint8 [B, 1 or 3, H, W] on the CPU, a micro-batch at a time, so that any number fits in memory."""
        made = self.generate(partial(self.codes, plan, callback=callback), condition, key_B)
        return (image_BCHW for image_BCHW, _ in made)

    def generate(self, codes: Codes, condition: Conditions, key_B: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """`images` with the codes that they are decoded from, whatever makes those."""
        return self._generate(codes, condition, key_B, _bytes, fill=True)

    @torch.no_grad()
    def _generate(
        self,
        codes: Codes,
        condition: Conditions,
        key_B: Tensor,
        finish: Callable[[Tensor], Any] | None,
        fill: bool,
    ) -> Iterator[tuple[Any, Tensor]]:
        """What `finish` makes of the images, and their codes, a micro-batch at a time; without it the codes twice.

        With `fill` the last one is filled up and cut again, so that every image is computed at one batch size,
        to the last bit whatever is made beside it; without, a single image costs a single image. A batch that does
        not fit in memory is halved, and so are those after it.
        """
        size, done = self.config.micro_batch, 0
        while done < len(condition):
            index_B = torch.arange(done, min(done + size, len(condition)))
            filled_B = torch.cat([index_B, index_B[-1:].expand(size - len(index_B) if fill else 0)])
            made = self._make(codes, condition[filled_B], key_B[filled_B], finish)
            if made is None:
                size = self._halve(len(filled_B))
                continue
            done += len(index_B)
            yield made[0][: len(index_B)], made[1][: len(index_B)]

    def _make(
        self, codes: Codes, condition: Condition, key_B: Tensor, finish: Callable[[Tensor], Any] | None
    ) -> tuple[Any, Tensor] | None:
        """One batch of `_generate`, or None when there is no memory for it, but might be for half of it."""
        try:
            code_BLC = _finite(codes(condition, key_B))
            made = finish(_finite(self.teacher.decode(code_BLC)).float()) if finish else code_BLC.cpu()
        except RuntimeError as error:
            if len(key_B) == 1 or not is_out_of_memory(error):
                raise
            return None
        return made, code_BLC.cpu()

    def _halve(self, size: int) -> int:
        # Not where the error is caught: it holds on to the tensors of the batch that failed.
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        half = size // 2
        message = f"{size} images do not fit in memory at once; going on with {half}, the same images up to rounding"
        warnings.warn(message, stacklevel=2)
        return half

    def __call__(
        self,
        labels: Sequence[int] | None = None,
        seeds: Sequence[int] | None = None,
        steps: Steps | None = None,
        schedule: Sequence[int] | None = None,
        teacher_span: tuple[int, int] | None = None,
        prefix: Prefix = "causal",
        output: Format = "pil",
        callback: Callback | None = None,
        prompts: Sequence[str] | None = None,
    ) -> Output:
        """Generate one image per label or prompt.

        Args:
            labels: a class for each image, of a model of classes; any sequence, as for `seeds`.
            seeds: a seed for each image; by default 0, 1, 2 ...
            steps: see `plan`.
            schedule: see `plan`.
            teacher_span: see `plan`.
            prefix: see `plan`.
            output: PIL images (`pil`), an `array`, a `tensor`, or `codes` alone, which are not decoded; see `Output`.
            callback: hears of every step, once for each micro-batch.
            prompts: a text for each image, of a model of captions; an empty one leaves the image to the model.

        Raises:
            ValueError: no label or prompt, or such as this model does not read; a plan or output that does not exist;
                another number of seeds; the model's output is not finite.
        """
        condition = self._asked(labels, prompts)
        pairs = self._pairs(condition, seeds, steps, schedule, teacher_span, prefix, output, callback)
        images, codes = zip(*pairs, strict=True)
        gather = _FORMATS[output][1]
        return Output(gather(images), torch.stack(codes))

    def stream(
        self,
        labels: Sequence[int] | None = None,
        seeds: Sequence[int] | None = None,
        steps: Steps | None = None,
        schedule: Sequence[int] | None = None,
        teacher_span: tuple[int, int] | None = None,
        prefix: Prefix = "causal",
        output: Format = "pil",
        callback: Callback | None = None,
        prompts: Sequence[str] | None = None,
    ) -> Iterator[Any]:
        """Generate one image per label or prompt, one after the other, holding a micro-batch of them at a time.

        Args:
            labels: see `__call__`, like all others.
            seeds: a seed for each image.
            steps: of the plan.
            schedule: of the plan.
            teacher_span: of the plan.
            prefix: of the plan.
            output: what comes of each: a PIL image (`pil`), an `array` [H, W, C], a `tensor` [C, H, W], or its
                `codes` [L, C].
            callback: hears of every step.
            prompts: in place of labels.

        Raises:
            ValueError: as `__call__`, at once; at its turn, the model's output is not finite.
        """
        condition = self._asked(labels, prompts)
        pairs = self._pairs(condition, seeds, steps, schedule, teacher_span, prefix, output, callback)
        return (image for image, _ in pairs)

    def _asked(self, labels: Sequence[int] | None, prompts: Sequence[str] | None) -> Conditions:
        """What a user asks for, one an image."""
        given = prompts if labels is None else labels
        if given is None or (labels is not None and prompts is not None):
            raise ValueError("give either labels or prompts, one for each image")
        if not len(given):
            raise ValueError(f"{'prompts' if labels is None else 'labels'} is empty; give one for each image")
        if labels is not None:
            return self.labels(labels)
        return Asked.in_turn(self.table(prompts), len(given))

    def _pairs(
        self,
        condition: Conditions,
        seeds: Sequence[int] | None,
        steps: Steps | None,
        schedule: Sequence[int] | None,
        teacher_span: tuple[int, int] | None,
        prefix: Prefix,
        output: Format,
        callback: Callback | None,
    ) -> Iterator[tuple[Any, Tensor]]:
        """Each image with its codes, one by one; everything is checked before the first."""
        plan = self.plan(steps, schedule, teacher_span, prefix)
        if output not in _FORMATS:
            raise ValueError(f"unknown output {output!r}; choose one of {', '.join(_FORMATS)}")
        seeds = range(len(condition)) if seeds is None else seeds
        if len(seeds) != len(condition):
            raise ValueError(f"{len(seeds)} seeds do not fit {len(condition)} images; give one for each")
        key_B = torch.cat([image_keys("image", seed, [0]) for seed in seeds])
        codes = partial(self.codes, plan, callback=callback)
        batches = self._generate(codes, condition, key_B, _FORMATS[output][0], fill=False)
        return chain.from_iterable(zip(images, codes, strict=True) for images, codes in batches)


def _bytes(image_BCHW: Tensor) -> Tensor:
    return to_uint8(image_BCHW).cpu()


def _array(image_BCHW: Tensor) -> np.ndarray:
    return _bytes(image_BCHW).permute(0, 2, 3, 1).contiguous().numpy()


# What becomes of a batch of decoded images, and of single ones when all are there; codes are not decoded.
_FORMATS: dict[str, tuple[Callable[[Tensor], Any] | None, Callable[..., Any]]] = {
    "pil": (lambda image_BCHW: to_pil(_bytes(image_BCHW)), list),
    "array": (_array, np.stack),
    "tensor": (lambda image_BCHW: image_BCHW.clamp(-1, 1).cpu(), torch.stack),
    "codes": (None, lambda codes: None),
}


def _finite(output: Tensor) -> Tensor:
    if not output.isfinite().all():
        raise ValueError(
            "the model's output is not finite; its weights are damaged, or bfloat16 or float16 overflowed: use float32"
        )
    return output


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory ran out; on a CPU torch has no exception of its own for it."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def problems(folder: Path) -> list[str]:
    """What is wrong with a pipeline folder's weights, a sentence each; empty when every hash agrees."""
    hashes = load_json(folder / INDEX).get("sha256")
    if not hashes:
        return [f"{folder / INDEX} lists no hashes, so nothing can be checked"]
    found = []
    for name, expected in hashes.items():
        path = folder / name
        if not path.is_file():
            found.append(f"{path} is missing")
        elif sha256(path) != expected:
            found.append(f"{path} is damaged: its hash is not the index's")
    return found
