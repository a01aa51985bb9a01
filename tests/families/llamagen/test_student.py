import math
from dataclasses import asdict, replace

import pytest
import torch

from distilled_decoding import codebook
from distilled_decoding.condition import Condition, Labels
from distilled_decoding.families.llamagen.student import LlamaGenStudent, StudentConfig
from distilled_decoding.families.llamagen.teacher import LlamaGenTeacher
from distilled_decoding.sampling import jump
from distilled_decoding.student import final_sequence
from distilled_decoding.teacher import Guidance
from tests.families.llamagen import reference
from tests.families.llamagen.test_teacher import CONDITIONS, teacher_of
from tests.families.llamagen.test_transformer import CAPTIONED, CONFIG, randomised
from tests.golden import load_case, pass_known


@pytest.fixture(params=["labels", "captions"])
def condition(request: pytest.FixtureRequest) -> Condition:
    return CONDITIONS[request.param]


@pytest.fixture
def teacher(condition: Condition) -> LlamaGenTeacher:
    return teacher_of(condition)


@pytest.fixture
def student(condition: Condition) -> LlamaGenStudent:
    torch.manual_seed(1)
    config = CONFIG if isinstance(condition, Labels) else CAPTIONED
    return randomised(LlamaGenStudent(StudentConfig(**asdict(config), code_dim=4)))


KNOWN_B = torch.tensor([0, 5, 16])


@torch.no_grad()
@pytest.mark.parametrize("call", ["t0", "mid", "mixed"])
def test_golden_forward(call: str):
    case = load_case("dd_llamagen_forward")
    student, codebook_VC = reference.student(case), reference.tokenizer(case).codebook_VC
    known_blocks_B = case.inputs[f"t_{call}"].long()
    known_BL = student.order.known_BL(known_blocks_B)
    code_BLC = torch.where(known_BL[..., None], case.inputs["data"], case.inputs["noise"])
    token_BL = codebook.nearest(code_BLC, codebook_VC)
    output = student(code_BLC, reference.labels(case, 10), known_blocks_B)
    final = pass_known(output, code_BLC, token_BL, known_BL)
    case.check(f"xt_{call}", code_BLC)
    case.check(f"idx_{call}", token_BL)
    case.check(f"tokens_{call}", output.code_BLC)
    case.check(f"logits_{call}", output.logits_BLV)
    case.check(f"final_tokens_{call}", final.code_BLC)
    case.check(f"final_logits_{call}", final.logits_BLV)
    for split in case.config["splits"]:
        case.check(
            f"final_x_{call}_split{split}", final_sequence(final, codebook_VC, student.order.tokens_before(split))
        )


def test_parameters_of_the_published_model():
    with torch.device("meta"):
        config = StudentConfig(
            dim=768,
            num_layers=12,
            num_heads=12,
            vocab_size=16384,
            num_tokens=256,
            num_classes=1000,
            code_dim=8,
        )
        model = LlamaGenStudent(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert sum(p.numel() for p in model.parameters()) == 98_321_672
    assert len(shapes) == 93
    assert shapes["tok_embeddings.weight"] == (768, 8) and shapes["tok_embeddings.bias"] == (768,)
    assert shapes["n_d_embed.weight"] == shapes["final_layer_conti.scale_shift_table"] == (2, 768)
    assert shapes["final_layer_conti.linear.weight"] == (8, 768)
    assert shapes["final_layer_conti.linear.bias"] == (8,)


@torch.no_grad()
def test_outputs_depend_on_their_own_and_earlier_inputs_only(student, condition):
    code_BLC = torch.randn(3, 16, 4)
    before = student(code_BLC, condition, KNOWN_B)
    for block in (0, 7, 15):
        changed_BLC = code_BLC.clone()
        changed_BLC[:, block] += 1
        after = student(changed_BLC, condition, KNOWN_B)
        expected = [later >= block for later in range(16)]
        assert (after.logits_BLV != before.logits_BLV).any(-1).any(0).tolist() == expected
        assert (after.code_BLC != before.code_BLC).any(-1).any(0).tolist() == expected


@torch.no_grad()
def test_known_blocks_pass_through(student, condition):
    codebook_VC = torch.randn(24, 4)
    token_BL = torch.randint(24, (3, 16))
    code_BLC = codebook.lookup(token_BL, codebook_VC)
    for split_block in (0, 7, 16):
        for known in (5, 7, 16):
            predicted_BLC = jump(student, code_BLC, condition, known, codebook_VC, split_block)
            assert torch.equal(predicted_BLC[:, :known], code_BLC[:, :known])


@torch.no_grad()
def test_logits_that_are_not_numbers_give_no_code(student, condition):
    torch.nn.init.constant_(student.output.weight, math.nan)
    code_BLC = jump(student, torch.randn(3, 16, 4), condition, 0, torch.randn(24, 4), split_block=7)
    assert code_BLC.isnan().all(-1).tolist() == [[True] * 7 + [False] * 9] * 3


def test_from_teacher_is_deterministic_and_shares_nothing(teacher):
    first, again = LlamaGenStudent.from_teacher(teacher), LlamaGenStudent.from_teacher(teacher)
    other = LlamaGenStudent.from_teacher(teacher, seed=1).state_dict()
    differing = [name for name, value in first.state_dict().items() if not torch.equal(value, other[name])]
    assert differing == ["n_d_embed.weight"]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    torch.nn.init.zeros_(first.output.weight)
    assert teacher.transformer.output.weight.any()


@torch.no_grad()
def test_from_teacher_has_the_teachers_logits_path_and_a_silent_code_head(teacher, condition):
    student = LlamaGenStudent.from_teacher(teacher).eval()
    x_BLD = torch.randn(3, 17, 32)
    rope = torch.view_as_real(torch.polar(torch.ones(17, 8), torch.randn(17, 8)))
    for model in (student, teacher.transformer):
        assert torch.equal(model.cls_embedding(condition), teacher.transformer.cls_embedding(condition))
    hidden_BLD = student.run_layers(x_BLD, rope)
    assert torch.equal(hidden_BLD, teacher.transformer.run_layers(x_BLD, rope))
    assert torch.equal(student.logits(hidden_BLD), teacher.transformer.logits(hidden_BLD))
    assert not student(torch.randn(3, 16, 4), condition, KNOWN_B).code_BLC.any()


@torch.no_grad()
def test_from_teacher_fits_the_token_embeddings(teacher):
    weight_DC, bias_D = torch.randn(32, 4), torch.randn(32)
    embedding = teacher.transformer.tok_embeddings.weight
    embedding.copy_(teacher.codebook @ weight_DC.T + bias_D)
    student = LlamaGenStudent.from_teacher(teacher)
    torch.testing.assert_close(student.tok_embeddings(teacher.codebook), embedding, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(student.tok_embeddings.weight, weight_DC, rtol=1e-4, atol=1e-4)


def test_both_heads_train_every_parameter(teacher, condition):
    student = LlamaGenStudent.from_teacher(teacher)
    torch.nn.init.normal_(student.final_layer_conti.linear.weight)
    output = student(torch.randn(3, 16, 4), condition, KNOWN_B)
    (output.logits_BLV.square().mean() + output.code_BLC.square().mean()).backward()
    assert all(p.grad is not None and p.grad.any() for p in student.parameters())


@torch.no_grad()
def test_padding_has_no_influence():
    padded = CONDITIONS["captions"]
    student = LlamaGenStudent.from_teacher(teacher_of(padded)).eval()
    torch.nn.init.normal_(student.final_layer_conti.linear.weight)
    text_BT1, code_BLC = padded.mask_BT[..., None], torch.randn(3, 16, 4)
    before = student(code_BLC, padded, KNOWN_B)
    filled = replace(padded, feature_BTF=torch.where(text_BT1, padded.feature_BTF, math.nan))
    features = student(code_BLC, filled, KNOWN_B)
    student.cls_embedding.register_forward_hook(lambda module, inputs, output: torch.where(text_BT1, output, 100.0))
    positions = student(code_BLC, padded, KNOWN_B)
    for after in (features, positions):
        assert torch.equal(after.logits_BLV, before.logits_BLV) and torch.equal(after.code_BLC, before.code_BLC)


@torch.no_grad()
def test_the_code_head_takes_the_class_or_the_mean_of_the_text(student, condition):
    taken = []
    student.final_layer_conti.register_forward_hook(lambda module, inputs, output: taken.append(inputs[1]))
    student(torch.randn(3, 16, 4), condition, KNOWN_B)
    embedded_BTD = student.cls_embedding(condition)
    if isinstance(condition, Labels):
        assert torch.equal(taken[0], embedded_BTD)
    else:
        for mean_1D, embedded_TD, text_T in zip(taken[0], embedded_BTD, condition.mask_BT, strict=True):
            torch.testing.assert_close(mean_1D[0], embedded_TD[text_T].mean(0))


@torch.no_grad()
def test_a_caption_is_told_from_another_and_from_none(student, condition):
    code_BLC = torch.randn(3, 16, 4)
    own = student(code_BLC, condition, KNOWN_B)
    for other in (condition[torch.tensor([1, 2, 0])], condition.null()):
        seen = student(code_BLC, other, KNOWN_B)
        assert (seen.logits_BLV != own.logits_BLV).flatten(1).any(1).all()
        assert (seen.code_BLC != own.code_BLC).flatten(1).any(1).all()


@torch.no_grad()
def test_with_a_flow_head_known_codes_are_read_as_the_teacher_reads_tokens(teacher, condition):
    """Where the affine map fits the embeddings exactly and all is known, the student is the teacher."""
    embedding = teacher.transformer.tok_embeddings.weight
    embedding.copy_(teacher.codebook @ torch.randn(4, 32) + torch.randn(32))
    student = LlamaGenStudent.from_teacher(teacher, head="flow").eval()
    student.n_d_embed.weight.zero_()
    token_BL = torch.randint(24, (3, 16))
    output = student(codebook.lookup(token_BL, teacher.codebook), condition, torch.full((3,), 16))
    expected_BLV = teacher.forced_logits(token_BL, condition, Guidance())
    torch.testing.assert_close(output.logits_BLV, expected_BLV, rtol=1e-4, atol=1e-4)
    assert output.code_BLC is None
