"""A good teacher and a good student pass; each promise, broken on purpose, is named."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distilled_decoding.blocks import BlockOrder
from distilled_decoding.check import check_student, check_teacher
from distilled_decoding.codebook import lookup, nearest
from distilled_decoding.condition import Condition, Labels, stand_ins
from distilled_decoding.student import StudentOutput
from distilled_decoding.teacher import Guidance
from examples import pixel_teacher
from tests import tiny


def pixels() -> tuple[Any, nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher = pixel_teacher.PixelTeacher(pixel_teacher.Network(pixel_teacher.Config()))
    return teacher, pixel_teacher.PixelStudent.from_teacher(teacher, 0)


def llamagen() -> tuple[Any, nn.Module]:
    pipe = tiny.pipeline()
    return pipe.teacher, pipe.student


def var() -> tuple[Any, nn.Module]:
    pipe = tiny.pipeline(family="var")
    return pipe.teacher, pipe.student


class Peeking(nn.Module):
    """A student with a code head, that is taken for one with a flow head."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student, self.order = student, student.order

    def forward(self, *args: Any) -> StudentOutput:
        return StudentOutput(self.student(*args).logits_BLV, None)


FAMILIES: list[Callable[[], tuple[Any, nn.Module]]] = [llamagen, var, pixels]


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.__name__)
def models(request: pytest.FixtureRequest) -> tuple[Any, nn.Module]:
    return request.param()


def test_a_good_teacher_passes(models) -> None:
    check_teacher(models[0])


def test_a_teacher_is_checked_with_two_conditions(models) -> None:
    teacher, _ = models
    with pytest.raises(ValueError, match="condition must be 2 different ones, got 3"):
        check_teacher(teacher, stand_ins(teacher, 3))


def test_a_good_student_passes(models) -> None:
    teacher, student = models
    check_student(student, teacher)


@pytest.mark.parametrize("family", ["llamagen", "var"])
def test_a_flow_head_passes_unless_it_sees_the_noise_that_is_mapped(family: str) -> None:
    pipe = tiny.pipeline(family=family)
    check_student(pipe.new_student(0, "flow"), pipe.teacher)
    with pytest.raises(ValueError, match="a flow head must not see the noise that is mapped, but token 0 sees its own"):
        check_student(Peeking(pipe.student), pipe.teacher)


def test_good_models_of_captions_pass() -> None:
    pipe = tiny.pipeline(family="text")
    check_teacher(pipe.teacher)
    check_student(pipe.student, pipe.teacher)


def test_the_models_are_left_as_they_were(models) -> None:
    teacher, student = models
    for model, check in ((teacher, lambda: check_teacher(teacher)), (student, lambda: check_student(student, teacher))):
        model.train()
        next(model.children()).eval()
        before = ({n: v.clone() for n, v in model.state_dict().items()}, [m.training for m in model.modules()])
        trained = [p.requires_grad for p in model.parameters()]
        torch.manual_seed(7)
        check()
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(7)))
        assert [m.training for m in model.modules()] == before[1]
        assert [p.requires_grad for p in model.parameters()] == trained
        assert all(p.grad is None for p in model.parameters())
        assert all(torch.equal(value, before[0][name]) for name, value in model.state_dict().items())
        model.eval()


class Wrapped:
    """A teacher that does what another does."""

    def __init__(self, teacher: Any) -> None:
        self.teacher = teacher

    def __getattr__(self, name: str) -> Any:
        return getattr(self.teacher, name)


class Speechless(Wrapped):
    def __getattr__(self, name: str) -> Any:
        if name in ("feed", "encode"):
            raise AttributeError(name)
        return super().__getattr__(name)


class ListOfBlocks(Wrapped):
    order = (1, 4, 9)


class Classless(Wrapped):
    num_classes = 0


class Captionless(Wrapped):
    num_classes = 0
    caption_shape = (12, 0)


class FlatCodebook(Wrapped):
    codebook = torch.zeros(16)


class OneCode(Wrapped):
    codebook = torch.zeros(1, 4)


class BrokenCodebook(Wrapped):
    @property
    def codebook(self) -> Tensor:
        return self.teacher.codebook / 0


class HalfLogits(Wrapped):
    def forced_logits(self, *args: Any) -> Tensor:
        return self.teacher.forced_logits(*args).half()


class ShortLogits(Wrapped):
    def forced_logits(self, *args: Any) -> Tensor:
        return self.teacher.forced_logits(*args)[:, 1:]


class TruncatedLogits(Wrapped):
    def forced_logits(self, *args: Any) -> Tensor:
        logits_BLV = self.teacher.forced_logits(*args)
        return logits_BLV.masked_fill(logits_BLV < logits_BLV.mean(), -torch.inf)


class FlatNext(Wrapped):
    def next_logits(self, state: Any) -> Tensor:
        return self.teacher.next_logits(state)[:, 0]


class Restless(Wrapped):
    def forced_logits(self, *args: Any) -> Tensor:
        logits_BLV = self.teacher.forced_logits(*args)
        return logits_BLV + torch.randn_like(logits_BLV)


class SeesItsOwnBlock(Wrapped):
    def forced_logits(self, token_BL: Tensor, *args: Any) -> Tensor:
        return self.teacher.forced_logits(token_BL, *args) + F.one_hot(token_BL, len(self.codebook))


class SeesTheEnd(Wrapped):
    def forced_logits(self, token_BL: Tensor, *args: Any) -> Tensor:
        return self.teacher.forced_logits(token_BL, *args) + token_BL[:, -1:, None]


class SeesNothing(Wrapped):
    def forced_logits(self, token_BL: Tensor, *args: Any) -> Tensor:
        return self.teacher.forced_logits(torch.zeros_like(token_BL), *args)


class FlatFeatures(Wrapped):
    def forced_features(self, token_BL: Tensor, condition: Condition) -> Tensor:
        return self.teacher.forced_logits(token_BL, condition, Guidance())[:, 1:]


class FeaturesSeeTheEnd(Wrapped):
    def forced_features(self, token_BL: Tensor, condition: Condition) -> Tensor:
        return self.teacher.forced_logits(token_BL, condition, Guidance()) + token_BL[:, -1:, None]


class FeaturesSeeNothing(Wrapped):
    def forced_features(self, token_BL: Tensor, condition: Condition) -> Tensor:
        return self.teacher.forced_logits(torch.zeros_like(token_BL), condition, Guidance())


class FeedForgets(Wrapped):
    def feed(self, state: Any, token_BK: Tensor) -> Any:
        return self.teacher.feed(state, torch.zeros_like(token_BK))


class SamplesUnguided(Wrapped):
    def start(self, condition: Condition, guidance: Guidance, prefix_BL: Tensor | None = None) -> Any:
        return self.teacher.start(condition, Guidance(), prefix_BL)


class IgnoresThePrefix(Wrapped):
    def start(self, condition: Condition, guidance: Guidance, prefix_BL: Tensor | None = None) -> Any:
        return self.teacher.start(condition, guidance, None if prefix_BL is None else torch.zeros_like(prefix_BL))


class IgnoresThePrefixUnguided(Wrapped):
    """As the published code does."""

    def start(self, condition: Condition, guidance: Guidance, prefix_BL: Tensor | None = None) -> Any:
        if prefix_BL is not None and not guidance.is_active:
            prefix_BL = torch.zeros_like(prefix_BL)
        return self.teacher.start(condition, guidance, prefix_BL)


class TakesAnyPrefix(Wrapped):
    def start(self, condition: Condition, guidance: Guidance, prefix_BL: Tensor | None = None) -> Any:
        if prefix_BL is not None and prefix_BL.shape[1] == self.order.length:
            return None
        return self.teacher.start(condition, guidance, prefix_BL)


class StumblesOverAPrefix(Wrapped):
    def start(self, condition: Condition, guidance: Guidance, prefix_BL: Tensor | None = None) -> Any:
        if prefix_BL is not None and prefix_BL.shape[1] == self.order.length:
            raise IndexError("out of range")
        return self.teacher.start(condition, guidance, prefix_BL)


class RelabelsImages(Wrapped):
    """Both ways of computing agree, on other labels."""

    def label(self, condition: Condition) -> Condition:
        raise NotImplementedError

    def start(self, condition: Condition, *args: Any) -> Any:
        return self.teacher.start(self.label(condition), *args)

    def forced_logits(self, token_BL: Tensor, condition: Condition, guidance: Guidance) -> Tensor:
        return self.teacher.forced_logits(token_BL, self.label(condition), guidance)


class OneClassForAll(RelabelsImages):
    def label(self, condition: Condition) -> Condition:
        return Labels(condition.label_B.clamp(min=1) // self.num_classes * self.num_classes, self.num_classes)


class NoClassAtAll(RelabelsImages):
    def label(self, condition: Condition) -> Condition:
        return condition.null()


class NullIsAClass(RelabelsImages):
    def label(self, condition: Condition) -> Condition:
        return Labels(condition.label_B % self.num_classes, self.num_classes)


class OtherGuidance(Wrapped):
    """Both ways of computing agree, on another guidance."""

    def guidance(self, guidance: Guidance) -> Guidance:
        raise NotImplementedError

    def start(self, condition: Condition, guidance: Guidance, prefix_BL: Tensor | None = None) -> Any:
        return self.teacher.start(condition, self.guidance(guidance), prefix_BL)

    def forced_logits(self, token_BL: Tensor, condition: Condition, guidance: Guidance) -> Tensor:
        return self.teacher.forced_logits(token_BL, condition, self.guidance(guidance))


class GuidanceIgnored(OtherGuidance):
    def guidance(self, guidance: Guidance) -> Guidance:
        return Guidance()


class RampIgnored(OtherGuidance):
    def guidance(self, guidance: Guidance) -> Guidance:
        return Guidance(guidance.scale, num_blocks=guidance.num_blocks)


class GuidanceNeverEnds(OtherGuidance):
    def guidance(self, guidance: Guidance) -> Guidance:
        return Guidance(guidance.scale, guidance.ramp)


class PublishedGuidance(OtherGuidance):
    """cond + scale * (cond - uncond), as VAR counts."""

    def guidance(self, guidance: Guidance) -> Guidance:
        return Guidance(1 + guidance.scale, guidance.ramp, guidance.num_blocks) if guidance.scale > 1 else guidance


class MixesLogits(Wrapped):
    def next_logits(self, state: Any) -> Tensor:
        logits_BKV = self.teacher.next_logits(state)
        return logits_BKV + logits_BKV.mean(0)

    def forced_logits(self, *args: Any) -> Tensor:
        logits_BLV = self.teacher.forced_logits(*args)
        return logits_BLV + logits_BLV.mean(0)


class MixesImages(Wrapped):
    def decode(self, code_BLC: Tensor) -> Tensor:
        return self.teacher.decode(code_BLC - code_BLC.mean(0))


class DecodesWithoutGradient(Wrapped):
    @torch.no_grad()
    def decode(self, code_BLC: Tensor) -> Tensor:
        return self.teacher.decode(code_BLC)


class DecodesTheNearestCode(Wrapped):
    def decode(self, code_BLC: Tensor) -> Tensor:
        return self.teacher.decode(lookup(nearest(code_BLC, self.codebook), self.codebook))


class DecodesTwoChannels(Wrapped):
    def decode(self, code_BLC: Tensor) -> Tensor:
        return self.teacher.decode(code_BLC)[:, :1].expand(-1, 2, -1, -1)


class DecodesToNan(Wrapped):
    def decode(self, code_BLC: Tensor) -> Tensor:
        return self.teacher.decode(code_BLC) * torch.nan


class EncodesAGrid(Wrapped):
    def encode(self, image: Tensor) -> Tensor:
        return self.teacher.encode(image)[:, None]


class SharesItsState(Wrapped):
    """What a state is fed, its copies have been fed."""

    class State:
        def __init__(self, state: Any, original: Any = None) -> None:
            self.state, self.original = state, original

        def __deepcopy__(self, memo: dict) -> "SharesItsState.State":
            return SharesItsState.State(self.state, self)

    def start(self, *args: Any) -> Any:
        return self.State(self.teacher.start(*args))

    def next_logits(self, state: Any) -> Tensor:
        return self.teacher.next_logits(state.state)

    def feed(self, state: Any, token_BK: Tensor) -> Any:
        if state.original is not None:
            return state.original
        state.state = self.teacher.feed(state.state, token_BK)
        return state


class EncodesInt32(Wrapped):
    def encode(self, image: Tensor) -> Tensor:
        return self.teacher.encode(image).int()


class EncodesBeyond(Wrapped):
    def encode(self, image: Tensor) -> Tensor:
        return self.teacher.encode(image) + len(self.codebook)


BROKEN_TEACHERS = {
    Speechless: "Speechless lacks feed, encode",
    ListOfBlocks: r"order must be a BlockOrder, got \(1, 4, 9\)",
    Classless: "num_classes must be an integer of at least 1.*, got 0 and",
    Captionless: r"or 0 beside a `caption_shape` of two of them if captions are read, got 0 and \(12, 0\)",
    FlatCodebook: r"codebook must be a tensor \[V, C\] of 2 to 65536 codes, got \(16,\)",
    OneCode: r"codebook must be .*got \(1, 4\)",
    BrokenCodebook: "codebook must be finite everywhere",
    HalfLogits: "forced_logits with .* must be torch.float32 .*, got torch.float16",
    ShortLogits: "forced_logits with .* must be torch.float32 .*, got torch.float32",
    TruncatedLogits: "forced_logits with .* must be finite everywhere",
    FlatNext: "next_logits of block 0 .* must be torch.float32 .*, got torch.float32",
    Restless: "must give the same logits again",
    SeesItsOwnBlock: "must see earlier blocks only, but other tokens in block 0 change those up to it",
    SeesTheEnd: r"must see earlier blocks only, but other tokens in block \d+ change those up to it",
    SeesNothing: "must see all earlier blocks, but other tokens in block 0 change no later ones",
    FlatFeatures: r"forced_features must be a tensor \[2, \d+, 'D'\], got \(2,",
    FeaturesSeeTheEnd: r"forced_features must see earlier blocks only, but other tokens in block \d+ change those",
    FeaturesSeeNothing: "forced_features must see all earlier blocks, but other tokens in block 0 change no later ones",
    FeedForgets: "next_logits must equal forced_logits, but at block 1",
    SamplesUnguided: r"next_logits must equal forced_logits, but at block 0 with Guidance\(scale=3.0",
    IgnoresThePrefix: "a prefix must count as if it had been fed, but at block 1",
    IgnoresThePrefixUnguided: r"a prefix must count .* with Guidance\(scale=1.0",
    SharesItsState: "a deep copy of a state must go on by itself",
    TakesAnyPrefix: r"start must raise ValueError for a prefix of \d+ tokens, which leaves no block to predict",
    StumblesOverAPrefix: r"leaves no block to predict, but it raised IndexError\('out of range'\)",
    OneClassForAll: "the logits of two classes or captions must differ",
    NoClassAtAll: r"the logits of a class or caption must differ from those of condition.null\(\)",
    NullIsAClass: r"guidance of scale 0 must give the logits of condition.null\(\)",
    GuidanceIgnored: r"guidance of scale 0 must give the logits of condition.null\(\)",
    RampIgnored: r"forced_logits with .*linear.* must be cond \+ \(scale - 1\) \* \(cond - uncond\), but they differ",
    GuidanceNeverEnds: r"forced_logits with .*num_blocks=\d+\) must be cond",
    PublishedGuidance: r"forced_logits with Guidance\(scale=3.0, ramp='constant', num_blocks=None\) must be cond",
    MixesLogits: "must not depend on the others in its batch, .* the forced_logits of the first change",
    MixesImages: "must not depend on the others in its batch, .* decode makes another image of the first",
    DecodesWithoutGradient: "decode must pass gradients to its codes",
    DecodesTheNearestCode: "decode must pass gradients to its codes",
    DecodesTwoChannels: r"decode must give images \[2, 1 or 3, H, W\], got \(2, 2, \d+, \d+\)",
    DecodesToNan: "what decode gives must be finite everywhere",
    EncodesAGrid: r"what encode gives must be torch.int64 \[2, \d+\], got torch.int64 \[2, 1, \d+\]",
    EncodesInt32: "what encode gives must be torch.int64 .*, got torch.int32",
    EncodesBeyond: r"encode must give tokens in 0..\d+, got",
}


@pytest.mark.parametrize("broken", BROKEN_TEACHERS, ids=lambda kind: kind.__name__)
def test_a_broken_teacher_is_named(models, broken: type[Wrapped]) -> None:
    with pytest.raises(ValueError, match=BROKEN_TEACHERS[broken]):
        check_teacher(broken(models[0]))


class CutsThePrefix(Wrapped):
    def start(self, condition: Condition, guidance: Guidance, prefix_BL: Tensor | None = None) -> Any:
        if prefix_BL is not None and prefix_BL.shape[1] < self.order.length:
            prefix_BL = prefix_BL[:, : max(s for s in self.order.starts if s <= prefix_BL.shape[1])]
        return self.teacher.start(condition, guidance, prefix_BL)


def test_a_prefix_that_ends_inside_a_block_must_be_refused() -> None:
    with pytest.raises(ValueError, match="for a prefix of 1 tokens, which ends inside block 0, but it raised None"):
        check_teacher(CutsThePrefix(pixels()[0]))


def test_a_teacher_of_one_class_may_take_it_for_its_null() -> None:
    class Unconditional(NoClassAtAll):
        num_classes = 1

    check_teacher(Unconditional(pixels()[0]))


def test_a_long_sequence_is_checked_at_a_few_blocks() -> None:
    class Counting(Wrapped):
        fed = 0
        order = BlockOrder.raster(4096)
        num_classes = 2
        codebook = torch.linspace(-1, 1, 3)[:, None]

        def forced_logits(self, token_BL: Tensor, condition: Condition, guidance: Guidance) -> Tensor:
            """The codes before, summed up, on a scale that is the class's own."""
            before_BL = F.pad(lookup(token_BL, self.codebook)[..., 0].cumsum(1), (1, 0))[:, :-1]
            scaled = [before_BL * (1 + c.label_B[:, None]) for c in (condition, condition.null())]
            pair = torch.cat(scaled if guidance.is_active else scaled[:1])[..., None] * self.codebook[:, 0]
            return guidance.apply(pair, guidance.at_tokens(self.order)[:, None])

        def start(self, condition: Condition, guidance: Guidance, prefix_BL: Tensor | None = None) -> Any:
            prefix_BL = torch.zeros(len(condition), 0, dtype=torch.int64) if prefix_BL is None else prefix_BL
            if prefix_BL.shape[1] == self.order.length:
                raise ValueError("nothing left")
            return prefix_BL, condition, guidance

        def feed(self, state: Any, token_BK: Tensor) -> Any:
            self.fed += 1
            return torch.cat([state[0], token_BK], 1), *state[1:]

        def next_logits(self, state: Any) -> Tensor:
            token_BN, *others = state
            padded_BL = F.pad(token_BN, (0, self.order.length - token_BN.shape[1]))
            return self.forced_logits(padded_BL, *others)[:, token_BN.shape[1], None]

        def decode(self, code_BLC: Tensor) -> Tensor:
            return code_BLC.unflatten(1, (1, 64, 64)).squeeze(-1)

        def encode(self, image: Tensor) -> Tensor:
            return nearest(image.flatten(1)[..., None], self.codebook)

    teacher = Counting(None)
    check_teacher(teacher)
    assert 0 < teacher.fed < 64


class WrappedStudent(nn.Module):
    """A student that does what another does."""

    def __init__(self, student: nn.Module, codebook_VC: Tensor) -> None:
        super().__init__()
        self.student, self.order = student, student.order
        self.codes, self.channels = codebook_VC.shape

    def forward(self, *inputs: Any) -> StudentOutput:
        return self.student(*inputs)


class OtherBlocks(WrappedStudent):
    order = BlockOrder((1, 2))

    def __init__(self, student: nn.Module, codebook_VC: Tensor) -> None:
        super().__init__(student, codebook_VC)
        self.order = BlockOrder((1, 2))


class ReturnsATuple(WrappedStudent):
    def forward(self, *inputs: Any) -> Any:
        output = self.student(*inputs)
        return output.logits_BLV, output.code_BLC


class HalfCodes(WrappedStudent):
    def forward(self, *inputs: Any) -> StudentOutput:
        output = self.student(*inputs)
        return StudentOutput(output.logits_BLV, output.code_BLC.half())


class MissingToken(WrappedStudent):
    def forward(self, *inputs: Any) -> StudentOutput:
        output = self.student(*inputs)
        return StudentOutput(output.logits_BLV[:, 1:], output.code_BLC)


class NotFinite(WrappedStudent):
    def forward(self, *inputs: Any) -> StudentOutput:
        output = self.student(*inputs)
        return StudentOutput(output.logits_BLV, output.code_BLC / 0)


class DropsOut(WrappedStudent):
    def forward(self, code_BLC: Tensor, *others: Any) -> StudentOutput:
        return self.student(F.dropout(code_BLC), *others)


class SeesLaterBlocks(WrappedStudent):
    def forward(self, code_BLC: Tensor, *others: Any) -> StudentOutput:
        return self.student(code_BLC + code_BLC.mean(1, keepdim=True), *others)


class SilentlySeesLaterBlocks(WrappedStudent):
    """Its head says nothing yet."""

    def __init__(self, student: nn.Module, codebook_VC: Tensor) -> None:
        super().__init__(student, codebook_VC)
        self.peek = nn.Linear(self.channels, self.channels, bias=False)
        nn.init.zeros_(self.peek.weight)

    def forward(self, code_BLC: Tensor, *others: Any) -> StudentOutput:
        output = self.student(code_BLC, *others)
        return StudentOutput(output.logits_BLV, output.code_BLC + self.peek(code_BLC.mean(1, keepdim=True)))


class DeafToItself(WrappedStudent):
    def forward(self, code_BLC: Tensor, *others: Any) -> StudentOutput:
        shift = max(self.order.sizes)
        return self.student(F.pad(code_BLC, (0, 0, shift, 0))[:, :-shift], *others)


class SeesItselfOnly(WrappedStudent):
    def __init__(self, student: nn.Module, codebook_VC: Tensor) -> None:
        super().__init__(student, codebook_VC)
        self.logits = nn.Linear(self.channels, self.codes)

    def forward(self, code_BLC: Tensor, *others: Any) -> StudentOutput:
        return StudentOutput(self.logits(code_BLC), code_BLC)


class NeverToldWhatIsKnown(WrappedStudent):
    def forward(self, code_BLC: Tensor, condition: Condition, known_blocks_B: Tensor, *num: int) -> StudentOutput:
        return self.student(code_BLC, condition, torch.zeros_like(known_blocks_B), *num)


class NeverToldTheClass(WrappedStudent):
    def forward(self, code_BLC: Tensor, condition: Condition, known_blocks_B: Tensor, *num: int) -> StudentOutput:
        return self.student(code_BLC, condition.null(), known_blocks_B, *num)


class MixesStudents(WrappedStudent):
    def forward(self, *inputs: Any) -> StudentOutput:
        output = self.student(*inputs)
        return StudentOutput(output.logits_BLV + output.logits_BLV.mean(0), output.code_BLC)


class ReadsWholeSequences(WrappedStudent):
    def forward(self, code_BLC: Tensor, *others: Any) -> StudentOutput:
        missing = self.order.length - code_BLC.shape[1]
        return self.student(F.pad(code_BLC, (0, 0, 0, missing)), *others[:2])


class CountsItsTokens(WrappedStudent):
    def forward(self, code_BLC: Tensor, *others: Any) -> StudentOutput:
        output = self.student(code_BLC, *others)
        return StudentOutput(output.logits_BLV * code_BLC.shape[1], output.code_BLC)


class HasAnIdleParameter(WrappedStudent):
    def __init__(self, student: nn.Module, codebook_VC: Tensor) -> None:
        super().__init__(student, codebook_VC)
        self.idle = nn.Parameter(torch.zeros(3))


class LearnsNothing(WrappedStudent):
    @torch.no_grad()
    def forward(self, *inputs: Any) -> StudentOutput:
        return self.student(*inputs)


BROKEN_STUDENTS = {
    OtherBlocks: r"order must be the teacher's, .* got BlockOrder\(sizes=\(1, 2\)\)",
    ReturnsATuple: "must return a StudentOutput, got tuple",
    HalfCodes: "the student's code_BLC must be torch.float32 .*, got torch.float16",
    MissingToken: r"the student's logits_BLV must be torch.float32 .*, got",
    NotFinite: "the student's code_BLC must be finite everywhere",
    DropsOut: "must give the same logits again",
    SeesLaterBlocks: r"from earlier blocks only, but the logits of token \d+ sees token \d+",
    SilentlySeesLaterBlocks: r"from earlier blocks only, but the code of token \d+ sees token \d+",
    DeafToItself: "must see the input at the token it predicts, but token 0 does not",
    SeesItselfOnly: "must see the earlier blocks, but no later prediction sees token 0",
    NeverToldWhatIsKnown: "must read known_blocks_B",
    ReadsWholeSequences: r"the code of \d+ leading tokens must be torch.float32 \[2, \d+",
    CountsItsTokens: r"must predict \d+ leading tokens as it does among all, but its logits change",
    NeverToldTheClass: "must read its condition",
    MixesStudents: "must not depend on the others in its batch, .* the logits of the first change",
    HasAnIdleParameter: r"must reach every parameter of a student, but none reach idle \(1 in all\)",
    LearnsNothing: r"must reach every parameter of a student, but none reach .* \(\d+ in all\)",
}


@pytest.mark.parametrize("broken", BROKEN_STUDENTS, ids=lambda kind: kind.__name__)
def test_a_broken_student_is_named(models, broken: type[WrappedStudent]) -> None:
    teacher, student = models
    with pytest.raises(ValueError, match=BROKEN_STUDENTS[broken]):
        check_student(broken(student, teacher.codebook).eval(), teacher)


class SeesItsNeighbours(WrappedStudent):
    """In its own row, which its teacher samples at once."""

    def forward(self, code_BLC: Tensor, *others: Any) -> StudentOutput:
        row_BSKC = code_BLC.unflatten(1, (self.order.num_blocks, -1))
        return self.student((row_BSKC + row_BSKC.mean(2, keepdim=True)).flatten(1, 2), *others)


def test_a_student_must_not_see_its_own_block() -> None:
    teacher, student = pixels()
    with pytest.raises(ValueError, match="but the logits of token 1 sees token 0"):
        check_student(SeesItsNeighbours(student, teacher.codebook), teacher)


def test_a_student_must_be_a_module(models) -> None:
    teacher, student = models
    with pytest.raises(ValueError, match=r"must be a torch.nn.Module.*got function"):
        check_student(lambda *inputs: student(*inputs), teacher)
