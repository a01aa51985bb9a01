"""Whether a teacher or a student of your own keeps its promises, in the manner of scikit-learn's `check_estimator`.

What is promised is said by `Teacher` and `Student`. It is checked on two random sequences, and of a long sequence
at a few blocks only, so that a large model takes a few dozen passes.

Axis letters: B batch, L tokens in a sequence, K tokens in a block, V codebook entries, C code channels, H W image.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from distilled_decoding.blocks import BlockOrder
from distilled_decoding.codebook import lookup
from distilled_decoding.condition import Condition, stand_ins
from distilled_decoding.losses import corrupt
from distilled_decoding.noise import gaussian_noise, image_keys, uniform
from distilled_decoding.student import StudentOutput
from distilled_decoding.teacher import Guidance, Teacher, combine_guidance

_BATCH = 2
# Of a longer sequence only this many blocks are sampled in a row.
_RUN = 12
# The same arithmetic in another order (a cache, a batch of another size) may differ by this share of the spread,
_ROUNDING = 1e-3
# and the very same arithmetic, where only what must not matter has changed, by this one.
_SAME = 1e-5
# Codes are stored in two bytes.
_MAX_CODES = 2**16
_PLAIN = Guidance()


def check_teacher(teacher: Teacher, condition: Condition | None = None) -> None:
    """Check that a teacher keeps the promises of `Teacher`.

    It is checked in evaluation mode, where its codebook is. Its weights, its mode and torch's generators are left
    as they were.

    Args:
        teacher: the model.
        condition: two different ones; None gives classes in turn, or, to a teacher of captions, random features.

    Raises:
        ValueError: names the first promise that is broken.
    """
    with _undisturbed(teacher), torch.no_grad():
        for check in TEACHER_CHECKS:
            check(teacher)
        condition = _asked(teacher) if condition is None else condition.to(teacher.codebook.device)
        _expect(len(condition) == _BATCH, f"condition must be {_BATCH} different ones, got {len(condition)}")
        for check_with in CONDITIONED_CHECKS:
            check_with(teacher, condition)


def check_student(student: nn.Module, teacher: Teacher) -> None:
    """Check that a student keeps the promises of `Student`.

    What it sees is checked on its weights with a little noise added, because the silent heads of a fresh student
    would hide it. The student itself, its mode and torch's generators are left as they were.

    Args:
        student: on the teacher's device; it need not be trained.
        teacher: one that passes `check_teacher`; the student alone does not know the codebook and the classes.

    Raises:
        ValueError: names the first promise that is broken.
    """
    with _undisturbed(student), torch.no_grad():
        for check in STUDENT_CHECKS:
            check(student, teacher)


@contextmanager
def _undisturbed(model: object) -> Iterator[None]:
    """Evaluation mode inside; outside, the mode of every part and torch's generators are as before."""
    parts = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [part.training for part in parts]
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            for part in parts:
                part.training = False
            yield
    finally:
        for part, mode in zip(parts, modes, strict=True):
            part.training = mode


def _expect(holds: object, sentence: str) -> None:
    if not holds:
        raise ValueError(sentence)


def _expect_close(actual: Tensor, expected: Tensor, tolerance: float, promise: str) -> None:
    gap, spread = float((actual - expected).abs().max()), float(expected.std())
    _expect(gap <= tolerance * spread, f"{promise} they differ by {gap:.2g}, where the values' spread is {spread:.2g}")


def _expect_tensor(value: object, shape: tuple[int, ...], name: str, dtype: torch.dtype = torch.float32) -> None:
    found = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
    _expect(found == f"{dtype} {list(shape)}", f"{name} must be {dtype} {list(shape)}, got {found}")
    assert isinstance(value, Tensor)
    _expect(value.isfinite().all(), f"{name} must be finite everywhere, got inf or nan")


def _keys(teacher: Teacher) -> Tensor:
    return image_keys("evaluation", 0, range(_BATCH)).to(teacher.codebook.device)


def _asked(teacher: Teacher) -> Condition:
    return stand_ins(teacher, _BATCH).to(teacher.codebook.device)


def _tokens(teacher: Teacher) -> Tensor:
    """Random sequences, int64 [B, L]."""
    return (uniform(_keys(teacher), teacher.order.length, stream=1) * len(teacher.codebook)).long()


def _noise(teacher: Teacher) -> Tensor:
    return gaussian_noise(_keys(teacher), teacher.order.length, teacher.codebook.shape[1])


def _blocks(order: BlockOrder) -> list[int]:
    """The blocks at which a sequence is checked: the first two, one in the middle, the last."""
    return sorted({0, min(1, order.num_blocks - 1), order.num_blocks // 2, order.num_blocks - 1})


def _guidances(order: BlockOrder) -> list[Guidance]:
    """One of each kind."""
    return [_PLAIN, Guidance(3.0), Guidance(3.0, "linear"), Guidance(3.0, num_blocks=(order.num_blocks + 1) // 2)]


def _forced(teacher: Teacher, token_BL: Tensor, condition: Condition, guidance: Guidance = _PLAIN) -> Tensor:
    """Checked `forced_logits`, [B, L, V]."""
    logits_BLV = teacher.forced_logits(token_BL, condition, guidance)
    _expect_tensor(logits_BLV, (*token_BL.shape, len(teacher.codebook)), f"forced_logits with {guidance}")
    return logits_BLV


def _sampled(
    teacher: Teacher, condition: Condition, guidance: Guidance, first: int, end: int
) -> Iterator[tuple[int, Tensor]]:
    """Each of the blocks first..end-1 with its checked `next_logits` [B, K, V], behind a prefix unless `first` is 0."""
    order, token_BL = teacher.order, _tokens(teacher)
    prefix_BL = token_BL[:, : order.tokens_before(first)] if first else None
    state = teacher.start(condition, guidance, prefix_BL)
    for block in range(first, end):
        logits_BKV = teacher.next_logits(state)
        shape = (_BATCH, order.sizes[block], len(teacher.codebook))
        _expect_tensor(logits_BKV, shape, f"next_logits of block {block} with {guidance}")
        yield block, logits_BKV
        if block + 1 < end:
            state = teacher.feed(state, token_BL[:, order.span(block)])


def _teacher_is_complete(teacher: Teacher) -> None:
    missing = [name for name in vars(Teacher) if not name.startswith("_") and not hasattr(teacher, name)]
    _expect(not missing, f"{type(teacher).__name__} lacks {', '.join(missing)}; `Teacher` says what they do")


def _teacher_has_blocks_codes_and_classes(teacher: Teacher) -> None:
    order, codebook, num_classes = teacher.order, teacher.codebook, teacher.num_classes
    _expect(isinstance(order, BlockOrder), f"order must be a BlockOrder, got {order!r}")
    captions: Any = getattr(teacher, "caption_shape", None)
    reads_captions = num_classes == 0 and isinstance(captions, tuple) and len(captions) == 2
    sizes = captions if reads_captions else (num_classes,)
    _expect(
        all(isinstance(size, int) and size >= 1 for size in sizes),
        "num_classes must be an integer of at least 1 (a teacher without classes has one), or 0 beside a "
        f"`caption_shape` of two of them if captions are read, got {num_classes!r} and {captions!r}",
    )
    shape = tuple(codebook.shape) if isinstance(codebook, Tensor) else ()
    _expect(
        len(shape) == 2 and 2 <= shape[0] <= _MAX_CODES,
        f"codebook must be a tensor [V, C] of 2 to {_MAX_CODES} codes, got {shape or codebook!r}",
    )
    _expect_tensor(codebook, shape, "codebook")


def _teacher_repeats_itself(teacher: Teacher, condition: Condition) -> None:
    token_BL = _tokens(teacher)
    first_BLV, second_BLV = _forced(teacher, token_BL, condition), _forced(teacher, token_BL, condition)
    promise = "forced_logits must give the same logits again (is there dropout in evaluation mode?), but"
    _expect_close(second_BLV, first_BLV, _SAME, promise)


def _teacher_sees_earlier_blocks_only(teacher: Teacher, condition: Condition) -> None:
    order, token_BL = teacher.order, _tokens(teacher)
    before_BLV, vocab_size = _forced(teacher, token_BL, condition), len(teacher.codebook)
    for block in _blocks(order):
        span, changed_BL = order.span(block), token_BL.clone()
        changed_BL[:, span] = (changed_BL[:, span] + vocab_size // 2) % vocab_size
        after_BLV, end = _forced(teacher, changed_BL, condition), span.stop
        promise = (
            f"forced_logits must see earlier blocks only, but other tokens in block {block} change those up to it:"
        )
        _expect_close(after_BLV[:, :end], before_BLV[:, :end], _SAME, promise)
        _expect(
            end == order.length or not torch.equal(after_BLV[:, end:], before_BLV[:, end:]),
            f"forced_logits must see all earlier blocks, but other tokens in block {block} change no later ones "
            "(is the logits head still zero?)",
        )


def _teacher_reads_its_logits_from_features(teacher: Teacher, condition: Condition) -> None:
    if not hasattr(teacher, "forced_features"):
        return
    order, token_BL = teacher.order, _tokens(teacher)
    before_BLD = teacher.forced_features(token_BL, condition)
    found = tuple(before_BLD.shape) if isinstance(before_BLD, Tensor) else before_BLD
    shaped = isinstance(found, tuple) and len(found) == 3 and found[:2] == tuple(token_BL.shape)
    _expect(shaped, f"forced_features must be a tensor {[*token_BL.shape, 'D']}, got {found!r}")
    for block in _blocks(order):
        span, changed_BL = order.span(block), token_BL.clone()
        changed_BL[:, span] = (changed_BL[:, span] + len(teacher.codebook) // 2) % len(teacher.codebook)
        after_BLD, end = teacher.forced_features(changed_BL, condition), span.stop
        promise = (
            f"forced_features must see earlier blocks only, but other tokens in block {block} change those up to it:"
        )
        _expect_close(after_BLD[:, :end], before_BLD[:, :end], _SAME, promise)
        _expect(
            end == order.length or not torch.equal(after_BLD[:, end:], before_BLD[:, end:]),
            f"forced_features must see all earlier blocks, but other tokens in block {block} change no later ones",
        )


def _teacher_samples_what_it_forces(teacher: Teacher, condition: Condition) -> None:
    order, token_BL = teacher.order, _tokens(teacher)
    for guidance in _guidances(order):
        forced_BLV = _forced(teacher, token_BL, condition, guidance)
        for block, logits_BKV in _sampled(teacher, condition, guidance, 0, min(order.num_blocks, _RUN)):
            promise = f"next_logits must equal forced_logits, but at block {block} with {guidance}"
            _expect_close(logits_BKV, forced_BLV[:, order.span(block)], _ROUNDING, promise)


def _teacher_takes_a_prefix_as_fed(teacher: Teacher, condition: Condition) -> None:
    order, token_BL = teacher.order, _tokens(teacher)
    for guidance in (_PLAIN, Guidance(3.0)):
        forced_BLV = _forced(teacher, token_BL, condition, guidance)
        for first in _blocks(order)[1:]:
            for block, logits_BKV in _sampled(teacher, condition, guidance, first, min(first + 2, order.num_blocks)):
                promise = f"a prefix must count as if it had been fed, but at block {block}, behind a prefix of {first}"
                promise += f" blocks with {guidance}, next_logits are not forced_logits:"
                _expect_close(logits_BKV, forced_BLV[:, order.span(block)], _ROUNDING, promise)


def _teacher_goes_on_from_a_copy(teacher: Teacher, condition: Condition) -> None:
    order, token_BL = teacher.order, _tokens(teacher)
    if order.num_blocks == 1:
        return
    state = teacher.start(condition, _PLAIN)
    copied, (first, second) = deepcopy(state), (order.span(0), order.span(1))
    teacher.feed(state, (token_BL[:, first] + 1) % len(teacher.codebook))
    logits_BKV = teacher.next_logits(teacher.feed(copied, token_BL[:, first]))
    promise = "a deep copy of a state must go on by itself, but behind one next_logits are not forced_logits:"
    _expect_close(logits_BKV, _forced(teacher, token_BL, condition)[:, second], _ROUNDING, promise)


def _teacher_refuses_other_prefixes(teacher: Teacher, condition: Condition) -> None:
    order = teacher.order
    wrong = {order.length: "leaves no block to predict"}
    wrong |= {order.starts[b] + 1: f"ends inside block {b}" for b in _blocks(order) if order.sizes[b] > 1}
    for length, why in wrong.items():
        raised: Exception | None = None
        try:
            teacher.start(condition, _PLAIN, _tokens(teacher)[:, :length])
        except Exception as error:
            raised = error
        _expect(
            isinstance(raised, ValueError),
            f"start must raise ValueError for a prefix of {length} tokens, which {why}, but it raised {raised!r}",
        )


def _teacher_knows_its_condition(teacher: Teacher, condition: Condition) -> None:
    token_BL = _tokens(teacher)
    cond_BLV, null_BLV = _forced(teacher, token_BL, condition), _forced(teacher, token_BL, condition.null())
    without_BLV = _forced(teacher, token_BL, condition, Guidance(0.0))
    promise = "guidance of scale 0 must give the logits of condition.null(), but"
    _expect_close(without_BLV, null_BLV, _ROUNDING, promise)
    # A teacher of one class may take it for its null.
    if teacher.num_classes != 1:
        apart = (cond_BLV != null_BLV).flatten(1).any(1).all()
        _expect(apart, "the logits of a class or caption must differ from those of condition.null(), but are the same")
        twin_BLV = _forced(teacher, token_BL[torch.zeros_like(token_BL[:, 0])], condition)
        differ = not torch.equal(twin_BLV[0], twin_BLV[1])
        _expect(differ, "the logits of two classes or captions must differ, but are the same")


def _teacher_guides_as_documented(teacher: Teacher, condition: Condition) -> None:
    order, token_BL = teacher.order, _tokens(teacher)
    cond_BLV, null_BLV = _forced(teacher, token_BL, condition), _forced(teacher, token_BL, condition.null())
    for guidance in _guidances(order):
        scale_L = guidance.at_tokens(order, token_BL.device)
        expected_BLV = combine_guidance(cond_BLV, null_BLV, scale_L[:, None])
        guided_BLV = _forced(teacher, token_BL, condition, guidance)
        promise = f"forced_logits with {guidance} must be cond + (scale - 1) * (cond - uncond), but"
        _expect_close(guided_BLV, expected_BLV, _ROUNDING, promise)


def _teacher_keeps_images_apart(teacher: Teacher, condition: Condition) -> None:
    token_BL = _tokens(teacher)
    itself = torch.zeros_like(token_BL[:, 0])
    promise = "an image must not depend on the others in its batch, but beside another one"
    beside_LV = _forced(teacher, token_BL, condition)[0]
    alone_LV = _forced(teacher, token_BL[itself], condition[itself])[0]
    _expect_close(beside_LV, alone_LV, _SAME, f"{promise} the forced_logits of the first change:")
    code_BLC = lookup(token_BL, teacher.codebook)
    beside_CHW, alone_CHW = teacher.decode(code_BLC)[0], teacher.decode(code_BLC[itself])[0]
    _expect_close(beside_CHW, alone_CHW, _SAME, f"{promise} decode makes another image of the first:")


def _teacher_decodes(teacher: Teacher) -> None:
    # Somewhat beside the codebook, where a student's code head predicts.
    code_BLC = (lookup(_tokens(teacher), teacher.codebook) + 0.1 * _noise(teacher)).requires_grad_()
    with torch.enable_grad():
        image = teacher.decode(code_BLC)
        shape = tuple(image.shape) if isinstance(image, Tensor) else ()
        size = f"[{_BATCH}, 1 or 3, H, W]"
        fits = len(shape) == 4 and shape[0] == _BATCH and shape[1] in (1, 3)
        _expect(fits, f"decode must give images {size}, got {shape or image!r}")
        _expect_tensor(image, shape, "what decode gives")
        energy = image.square().sum()
    gradient = torch.autograd.grad(energy, code_BLC, allow_unused=True)[0] if energy.requires_grad else None
    _expect(
        gradient is not None and gradient.isfinite().all() and gradient.any(),
        "decode must pass gradients to its codes, which need not be in the codebook, but none arrive "
        "(is it under no_grad, or does it take the nearest code?)",
    )


def _teacher_encodes(teacher: Teacher) -> None:
    image = teacher.decode(lookup(_tokens(teacher), teacher.codebook)).clamp(-1, 1)
    token_BL = teacher.encode(image)
    _expect_tensor(token_BL, (_BATCH, teacher.order.length), "what encode gives", torch.int64)
    low, high, last = int(token_BL.min()), int(token_BL.max()), len(teacher.codebook) - 1
    _expect(low >= 0 and high <= last, f"encode must give tokens in 0..{last}, got {low}..{high}")


TEACHER_CHECKS = (
    _teacher_is_complete,
    _teacher_has_blocks_codes_and_classes,
    _teacher_decodes,
    _teacher_encodes,
)

CONDITIONED_CHECKS = (
    _teacher_repeats_itself,
    _teacher_sees_earlier_blocks_only,
    _teacher_reads_its_logits_from_features,
    _teacher_samples_what_it_forces,
    _teacher_takes_a_prefix_as_fed,
    _teacher_goes_on_from_a_copy,
    _teacher_refuses_other_prefixes,
    _teacher_knows_its_condition,
    _teacher_guides_as_documented,
    _teacher_keeps_images_apart,
)


def _inputs(teacher: Teacher) -> tuple[Tensor, Condition, Tensor]:
    """What a student reads: an image of pure noise, and one of which the first half of the blocks is known."""
    order = teacher.order
    known_blocks_B = torch.tensor([0, (order.num_blocks + 1) // 2], device=teacher.codebook.device)
    code_BLC = lookup(_tokens(teacher), teacher.codebook)
    x_BLC = corrupt(_noise(teacher), code_BLC, order.known_BL(known_blocks_B))
    return x_BLC, _asked(teacher), known_blocks_B


def _stirred(student: nn.Module) -> dict[str, Tensor]:
    """Its weights with a little noise, by name."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, value in student.named_parameters():
        weights[name] = value.detach() + 0.02 * torch.randn(value.shape, generator=generator).to(value)
    return weights


def _heads(output: StudentOutput) -> dict[str, Tensor]:
    own = {"logits": output.logits_BLV}
    return own if output.code_BLC is None else {**own, "code": output.code_BLC}


def _differ(one: StudentOutput, other: StudentOutput) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(_heads(one).values(), _heads(other).values(), strict=True))


def _student_has_the_teachers_blocks(student: nn.Module, teacher: Teacher) -> None:
    kind = type(student).__name__
    _expect(isinstance(student, nn.Module), f"a student must be a torch.nn.Module, which `distill` trains, got {kind}")
    order = getattr(student, "order", None)
    _expect(order == teacher.order, f"the student's order must be the teacher's, {teacher.order}, got {order}")


def _student_predicts_every_token(student: nn.Module, teacher: Teacher) -> None:
    x_BLC, condition, known_blocks_B = _inputs(teacher)
    output = student(x_BLC, condition, known_blocks_B)
    _expect(isinstance(output, StudentOutput), f"a student must return a StudentOutput, got {type(output).__name__}")
    _expect_tensor(output.logits_BLV, (*x_BLC.shape[:2], len(teacher.codebook)), "the student's logits_BLV")
    if output.code_BLC is not None:
        _expect_tensor(output.code_BLC, tuple(x_BLC.shape), "the student's code_BLC")


def _student_repeats_itself(student: nn.Module, teacher: Teacher) -> None:
    first, second = _heads(student(*_inputs(teacher))), _heads(student(*_inputs(teacher)))
    for head in first:
        promise = f"a student must give the same {head} again (is there dropout in evaluation mode?), but"
        _expect_close(second[head], first[head], _SAME, promise)


def _student_sees_itself_and_earlier_blocks(student: nn.Module, teacher: Teacher) -> None:
    order, weights, (x_BLC, *others) = teacher.order, _stirred(student), _inputs(teacher)
    before = functional_call(student, weights, (x_BLC, *others))
    for block in _blocks(order):
        span = order.span(block)
        for place in sorted({span.start, span.stop - 1}):
            changed_BLC = x_BLC.clone()
            changed_BLC[:, place] += 1
            after = functional_call(student, weights, (changed_BLC, *others))
            moved_L = torch.zeros(order.length, dtype=torch.bool, device=x_BLC.device)
            for head, value in _heads(before).items():
                gap_L = (_heads(after)[head] - value).abs().amax((0, 2))
                _expect_unseen(gap_L > _SAME * value.std(), place, span.stop, head)
                moved_L |= gap_L > 0
            if "code" in _heads(before):
                own = f"a student must see the input at the token it predicts, but token {place} does not"
                _expect(moved_L[place], own)
            else:
                own = f"a flow head must not see the noise that is mapped, but token {place} sees its own"
                _expect(not moved_L[place], own)
            seen = span.stop == order.length or moved_L[span.stop :].any()  # of the last block there is no later one
            _expect(seen, f"a student must see the earlier blocks, but no later prediction sees token {place}")


def _expect_unseen(moved_L: Tensor, place: int, next_block: int, head: str) -> None:
    """Expect that another input at `place` moves no other token in front of the next block."""
    for token in moved_L[:next_block].nonzero().flatten().tolist():
        _expect(
            token == place,
            "a student must predict a token from the input there and from earlier blocks only, "
            f"but the {head} of token {token} sees token {place}",
        )


def _student_is_told_what_is_known(student: nn.Module, teacher: Teacher) -> None:
    weights, (x_BLC, condition, known_blocks_B) = _stirred(student), _inputs(teacher)
    told = functional_call(student, weights, (x_BLC, condition, known_blocks_B))
    other = functional_call(student, weights, (x_BLC, condition, torch.zeros_like(known_blocks_B)))
    _expect(_differ(told, other), "a student must read known_blocks_B, but predicts the same whatever it says")


def _student_knows_its_condition(student: nn.Module, teacher: Teacher) -> None:
    weights, (x_BLC, condition, known_blocks_B) = _stirred(student), _inputs(teacher)
    own = functional_call(student, weights, (x_BLC, condition, known_blocks_B))
    swapped = condition[torch.tensor([1, 0])]
    other = functional_call(student, weights, (x_BLC, swapped, known_blocks_B))
    # With one class the two conditions are the same.
    told = teacher.num_classes == 1 or _differ(own, other)
    _expect(told, "a student must read its condition, but predicts the same for two of them")


def _student_keeps_images_apart(student: nn.Module, teacher: Teacher) -> None:
    weights, inputs = _stirred(student), _inputs(teacher)
    itself = torch.zeros_like(inputs[2])
    beside = _heads(functional_call(student, weights, inputs))
    alone = _heads(functional_call(student, weights, tuple(value[itself] for value in inputs)))
    for head in beside:
        promise = f"an image must not depend on the others in its batch, but beside another one the {head} of the first"
        _expect_close(beside[head][0], alone[head][0], _SAME, f"{promise} change:")


def _student_predicts_leading_blocks_alone(student: nn.Module, teacher: Teacher) -> None:
    (x_BLC, *others), weights = _inputs(teacher), _stirred(student)
    whole = _heads(functional_call(student, weights, (x_BLC, *others)))
    for block in _blocks(teacher.order):
        length = teacher.order.span(block).stop
        num_logits = teacher.order.span(block).start + 1
        part = _heads(functional_call(student, weights, (x_BLC[:, :length], *others, num_logits)))
        for head, value in whole.items():
            needed = num_logits if head == "logits" else length
            found = part[head][:, :needed] if head == "logits" else part[head]
            _expect_tensor(found, (len(x_BLC), needed, value.shape[2]), f"the {head} of {needed} leading tokens")
            promise = f"a student must predict {needed} leading tokens as it does among all, but its {head} change:"
            _expect_close(found, value[:, :needed], _SAME, promise)


def _student_learns_with_every_parameter(student: nn.Module, teacher: Teacher) -> None:
    weights = {name: value.requires_grad_() for name, value in _stirred(student).items()}
    with torch.enable_grad():
        output = functional_call(student, weights, _inputs(teacher))
        loss = torch.stack([head.square().mean() for head in _heads(output).values()]).sum()
    idle = list(weights)
    if loss.requires_grad:
        gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        idle = [name for name, gradient in zip(weights, gradients, strict=True) if gradient is None]
    _expect(
        not idle,
        f"gradients must reach every parameter of a student, but none reach {', '.join(idle[:3])} ({len(idle)} in all)",
    )


STUDENT_CHECKS = (
    _student_has_the_teachers_blocks,
    _student_predicts_every_token,
    _student_repeats_itself,
    _student_sees_itself_and_earlier_blocks,
    _student_is_told_what_is_known,
    _student_knows_its_condition,
    _student_keeps_images_apart,
    _student_predicts_leading_blocks_alone,
    _student_learns_with_every_parameter,
)
