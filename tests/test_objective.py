"""The distillation loss against hand values, its derivative and autograd; what the teacher must never meet."""

import math

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import siman_convert.networks  # noqa: F401  registers the paper's networks
from siman_convert.errors import InputError
from siman_convert.objective import Objective, attention_distance, distillation_loss, stage_outputs
from siman_convert.train import TrainingStep


def logits(seed: int, images: int = 5, classes: int = 7) -> Tensor:
    return 3 * torch.randn(images, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Recorder(nn.Module):
    """Answers with fixed logits, and keeps what it was asked and how."""

    def __init__(self, answers: Tensor) -> None:
        super().__init__()
        self.answers = nn.Parameter(answers)
        self.norm = nn.BatchNorm2d(3)
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        assert not self.training
        self.norm(images)
        self.seen.append(images)
        return self.answers * 1


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_by_hand(temperature: float) -> None:
    """Teacher (3/4, 1/4), student (1/2, 1/2): KL = 3/4 ln(3/2) + 1/4 ln(1/2); the second image adds none, the mean halves it."""
    teacher = temperature * torch.tensor([[math.log(3), 0.0], [1.0, -2.0]])
    student = temperature * torch.tensor([[0.0, 0.0], [2.0, -1.0]])
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert distillation_loss(student, teacher, temperature).item() == pytest.approx(temperature**2 * kl / 2, rel=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0, 8.0])
def test_the_gradient_is_the_difference_of_the_softened_answers(temperature: float) -> None:
    student, teacher = logits(0).requires_grad_(), logits(1)
    (grad,) = torch.autograd.grad(distillation_loss(student, teacher, temperature), student)
    p, q = (F.softmax(values.detach() / temperature, dim=1) for values in (student, teacher))
    assert torch.allclose(grad, temperature / len(p) * (p - q), atol=1e-14)
    assert torch.autograd.gradcheck(lambda s: distillation_loss(s, teacher, temperature), student)


def test_equal_answers_cost_nothing() -> None:
    student = logits(2).requires_grad_()
    loss = distillation_loss(student, student.detach() + 5.0, 4.0)  # a shift of all logits changes no answer
    assert loss.item() == pytest.approx(0.0, abs=1e-14)
    assert torch.autograd.grad(loss, student)[0].abs().max() < 1e-14


def test_half_precision_logits_are_compared_in_float32() -> None:
    student, teacher = logits(3).bfloat16(), logits(4).bfloat16()
    loss = distillation_loss(student, teacher, 3.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(distillation_loss(student.double(), teacher.double(), 3.0).item(), rel=1e-5)


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "mixed labels"])
def test_the_sum_of_both_parts(soft: bool) -> None:
    images, student, answers = torch.randn(5, 3, 4, 4), logits(5), logits(6)
    targets = F.softmax(logits(7), dim=1) if soft else torch.arange(5)
    objective = Objective(0.3, 0.1, Recorder(answers).eval(), distill_weight=0.7, temperature=2.0)
    expected = 0.7 * distillation_loss(student, answers, 2.0) + 0.3 * F.cross_entropy(
        student, targets, label_smoothing=0.1
    )
    loss, answered = objective(Recorder(student).eval(), images, targets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert torch.equal(answered, student)


def test_labels_alone_and_teacher_alone() -> None:
    images, student, targets = torch.randn(5, 3, 4, 4), logits(8), torch.arange(5)
    model = Recorder(student).eval()
    assert torch.equal(Objective()(model, images, targets)[0], F.cross_entropy(student, targets))
    taught = Objective(0.0, teacher=Recorder(logits(9)).eval(), distill_weight=1.0, temperature=4.0)
    assert torch.equal(taught(model, images, targets)[0], taught(model, images, targets.flip(0))[0])


def test_the_teacher_is_asked_the_same_images_and_stays_apart() -> None:
    """In eval mode under no_grad, whatever the student's mode; in no state dict, and no optimizer's parameters."""
    teacher = Recorder(torch.randn(4, 6)).eval()
    mean = teacher.norm.running_mean.clone()
    model = nn.Sequential(nn.Conv2d(3, 6, 4), nn.Flatten())
    step = TrainingStep(model, Objective(0.0, teacher=teacher, distill_weight=1.0, temperature=2.0)).train()
    images = torch.randn(4, 3, 4, 4)
    loss, answers = step(images, torch.arange(4))
    loss.backward()
    assert teacher.seen[0] is images
    assert torch.equal(answers, model(images))
    assert teacher.answers.grad is None
    assert torch.equal(teacher.norm.running_mean, mean)
    assert set(step.state_dict()) == {"model.0.weight", "model.0.bias"}
    assert {id(p) for p in step.parameters()} == {id(p) for p in model.parameters()}


def test_attention_by_hand() -> None:
    """q_s = (1, 0) of one channel, q_t = (9 + 16, 0) of two: equal once of length 1; then (1, 0) against (0, 1)."""
    here, there = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[3.0, 0.0]], [[-4.0, 0.0]]]])
    assert attention_distance({4: here}, {4: there}).item() == 0.0
    assert attention_distance({4: here}, {4: there.flip(3)}).item() == pytest.approx(math.sqrt(2))
    both = attention_distance({4: here, 8: here, 16: here}, {4: there, 8: there.flip(3), 32: there})
    assert both.item() == pytest.approx(math.sqrt(2))


def test_attention_has_a_gradient_and_none_at_equality() -> None:
    student, teacher = (torch.randn(3, 4, 5, 5, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: attention_distance({2: s}, {2: teacher}), student)
    (gradient,) = torch.autograd.grad(attention_distance({2: student}, {2: student.detach()}), student)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_stages_that_cannot_be_compared() -> None:
    with pytest.raises(InputError, match="no stage of equal size"):
        attention_distance({2: torch.zeros(1, 3, 8, 8)}, {2: torch.zeros(1, 3, 4, 4)})


@pytest.mark.parametrize("name", ["test_resnet", "siman_resnet20", "siman_vgg_small", "siman_resnet18_imagenet"])
def test_stage_outputs_are_those_of_the_stages_and_leave_no_hook(name: str) -> None:
    model = timm.create_model(name, num_classes=4).eval()
    with stage_outputs(model) as outputs:
        model(torch.randn(2, 3, 32, 32))
    assert len(outputs) >= 3
    for reduction, output in outputs.items():
        assert tuple(output.shape[2:]) == (32 // reduction, 32 // reduction)
    assert not any(module._forward_hooks for module in model.modules())
    with stage_outputs(model, wanted=False) as nothing:
        model(torch.randn(2, 3, 32, 32))
    assert nothing == {}


def test_a_network_without_the_modules_that_it_names() -> None:
    model = timm.create_model("hrnet_w18_small", num_classes=4).eval()  # names stem and stage1, and has neither
    with stage_outputs(model) as outputs, torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    with pytest.raises(InputError, match="no stage of equal size"):
        attention_distance(outputs, outputs)


def test_features_are_part_of_the_loss() -> None:
    student, teacher = (timm.create_model("test_resnet", num_classes=4).eval() for _ in range(2))
    images, targets = torch.randn(2, 3, 64, 64), torch.arange(2)
    loss, answers = Objective(1.0, teacher=teacher, feature_weight=0.5)(student, images, targets)
    with stage_outputs(student) as ours, stage_outputs(teacher) as theirs:
        student(images), teacher(images)
    expected = F.cross_entropy(answers, targets) + 0.5 * attention_distance(ours, theirs)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
