from dataclasses import asdict, replace

import pytest
import torch

from distilled_decoding import codebook
from distilled_decoding.condition import Labels
from distilled_decoding.families.var.student import StudentConfig, VARStudent
from distilled_decoding.families.var.teacher import VARTeacher
from distilled_decoding.families.var.transformer import Transformer
from distilled_decoding.sampling import jump
from distilled_decoding.student import final_sequence
from tests.families.var import reference
from tests.families.var.test_teacher import small_tokenizer
from tests.families.var.test_transformer import CONFIG, LENGTH, published_shapes, published_sizes, randomised
from tests.golden import load_case, pass_known

CONDITION = Labels.checked([4, 0, 2], 5)
KNOWN_B = torch.tensor([0, 2, 4])


@pytest.fixture
def teacher() -> VARTeacher:
    torch.manual_seed(0)
    return VARTeacher(small_tokenizer(), randomised(Transformer(CONFIG)))


@pytest.fixture
def student() -> VARStudent:
    torch.manual_seed(1)
    return randomised(VARStudent(StudentConfig(**asdict(CONFIG))))


@torch.no_grad()
@pytest.mark.parametrize("call", ["t0", "mid", "mixed"])
def test_golden_forward(call: str) -> None:
    case = load_case("dd_var_forward")
    student, codebook_VC = reference.student(case), reference.tokenizer(case).codebook_VC
    known_blocks_B = case.inputs[f"t_{call}"].long()
    known_BL = student.order.known_BL(known_blocks_B)
    code_BLC = torch.where(known_BL[..., None], case.inputs["data"], case.inputs["noise"])
    output = student(code_BLC, reference.labels(case, 10), known_blocks_B)
    final = pass_known(output, code_BLC, codebook.nearest(code_BLC, codebook_VC), known_BL)
    case.check(f"xt_{call}", code_BLC)
    case.check(f"x_BLCv_{call}", output.code_BLC)
    case.check(f"logits_{call}", output.logits_BLV)
    case.check(f"final_conti_{call}", final.code_BLC)
    case.check(f"final_logits_{call}", final.logits_BLV)
    for split in case.config["splits"]:
        case.check(
            f"final_seq_{call}_split{split}", final_sequence(final, codebook_VC, student.order.tokens_before(split))
        )


@pytest.mark.parametrize(
    ("depth", "parameters", "tensors"),
    [(16, 328_165_664, 240), (20, 635_399_088, 296), (24, 1_092_478_560, 352)],
)
def test_parameters_of_the_published_models(depth: int, parameters: int, tensors: int) -> None:
    with torch.device("meta"):
        model = VARStudent(StudentConfig(**asdict(published_sizes(depth))))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(shapes) == tensors
    width = 64 * depth
    expected = published_shapes(depth, 681, 11)
    expected["n_d_embed.weight"] = expected["final_layer_conti.scale_shift_table"] = (2, width)
    expected |= {"final_layer_conti.linear.weight": (32, width), "final_layer_conti.linear.bias": (32,)}
    for index in range(depth + 1):
        expected[f"layerwise_n_d_embed.{index}.weight"] = (width, width)
        expected[f"layerwise_n_d_embed.{index}.bias"] = (width,)
    assert shapes == expected


@torch.no_grad()
def test_outputs_depend_on_their_own_input_and_on_coarser_scales_only(student) -> None:
    code_BLC = torch.randn(3, LENGTH, 4)
    before = student(code_BLC, CONDITION, KNOWN_B)
    block_L, position_L = student.order.block_L(), torch.arange(LENGTH)
    for position in (0, 3, 5, 29):
        changed_BLC = code_BLC.clone()
        changed_BLC[:, position] += 1
        after = student(changed_BLC, CONDITION, KNOWN_B)
        expected_L = (position_L == position) | (block_L > block_L[position])
        assert torch.equal((after.logits_BLV != before.logits_BLV).any(-1).any(0), expected_L)
        assert torch.equal((after.code_BLC != before.code_BLC).any(-1).any(0), expected_L)


@torch.no_grad()
def test_what_is_known_is_told_to_the_positions_it_concerns(student) -> None:
    """Positions that nothing newly known precedes predict as before; the class position is always known."""
    code_BLC, block_L = torch.randn(3, LENGTH, 4), student.order.block_L()
    outputs = [student(code_BLC, CONDITION, torch.full((3,), known)).logits_BLV for known in range(5)]
    for known in range(4):
        moved_L = (outputs[known + 1] != outputs[known]).any(-1).any(0)
        assert torch.equal(moved_L, block_L >= known)


@torch.no_grad()
def test_known_blocks_pass_through(student) -> None:
    codebook_VC = torch.randn(24, 4)
    token_BL = torch.randint(24, (3, LENGTH))
    code_BLC = codebook.lookup(token_BL, codebook_VC)
    for split_block in (0, 2, 4):
        for known in (2, 3, 4):
            known_BLC = code_BLC[:, : student.order.tokens_before(known)]
            predicted_BLC = jump(student, code_BLC, CONDITION, known, codebook_VC, split_block)
            assert torch.equal(predicted_BLC[:, : known_BLC.shape[1]], known_BLC)


def test_from_teacher_is_deterministic_and_shares_nothing(teacher) -> None:
    first, again = VARStudent.from_teacher(teacher), VARStudent.from_teacher(teacher)
    other = VARStudent.from_teacher(teacher, seed=1).state_dict()
    differing = {name for name, value in first.state_dict().items() if not torch.equal(value, other[name])}
    layerwise = {f"layerwise_n_d_embed.{index}.weight" for index in range(3)}
    assert differing == {"pos_1LC", "lvl_embed.weight", "n_d_embed.weight"} | layerwise
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    theirs = {p.untyped_storage().data_ptr() for p in teacher.parameters()}
    assert not theirs & {p.untyped_storage().data_ptr() for p in first.parameters()}


@torch.no_grad()
@pytest.mark.parametrize("change", [{}, {"attn_l2_norm": False}, {"shared_aln": True}])
def test_from_teacher_has_the_teachers_logits_path_and_a_silent_code_head(change: dict) -> None:
    teacher = VARTeacher(small_tokenizer(), randomised(Transformer(replace(CONFIG, **change))))
    student, transformer = VARStudent.from_teacher(teacher).eval(), teacher.transformer
    class_BD, code_BLC = transformer.class_emb(CONDITION.label_B), torch.randn(3, LENGTH, 4)
    assert torch.equal(student.class_emb(CONDITION.label_B), class_BD)
    assert torch.equal(student.start(class_BD), transformer.start(class_BD))
    # The student's own first scale, one token, has a place that the teacher has not.
    behind, theirs = slice(2, None), slice(1, None)
    assert torch.equal(student.embed(code_BLC[:, 1:], behind), transformer.embed(code_BLC[:, 1:], theirs))
    x_BLD = torch.randn(3, LENGTH, 32)
    mask_LL = teacher.order.attends_LL(own_block=True)
    hidden, logits = [], []
    for model in (student, transformer):
        hidden.append(model.run_layers(x_BLD, model.modulations(class_BD), mask_LL))
        logits.append(model.logits(hidden[-1], class_BD))
    assert torch.equal(*hidden) and torch.equal(*logits)
    assert not student(code_BLC, CONDITION, KNOWN_B).code_BLC.any()


def test_both_heads_train_every_parameter(teacher) -> None:
    student = VARStudent.from_teacher(teacher)
    torch.nn.init.normal_(student.final_layer_conti.linear.weight)
    output = student(torch.randn(3, LENGTH, 4), CONDITION, KNOWN_B)
    (output.logits_BLV.square().mean() + output.code_BLC.square().mean()).backward()
    assert all(p.grad is not None and p.grad.any() for p in student.parameters())
