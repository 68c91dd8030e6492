"""What training minimises: cross-entropy with the labels and, in binary epochs, the distance to a teacher.

    L = distill_weight * T^2 * KL(softmax(t / T) || softmax(s / T)) + feature_weight * D + label_weight * CE(s, labels)

Student's and teacher's logits s and t (N, K) answer the same augmented (and mixed) images; means over the batch. The factor T^2
keeps the gradient's size as T grows (Hinton, Vinyals and Dean, arXiv 1503.02531). D is the distance between where the two look,
stage by stage (`attention_distance`), which does not ask for equal channels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from siman_convert.errors import InputError

Maps = dict[int, Tensor]  # reduction of a stage -> its output, (N, C, H, W)


@dataclass(frozen=True)
class Objective:
    """The loss of a batch. `teacher`: in eval mode, on the images' device; None where there is nothing to distil.

    No nn.Module, so that the teacher is part of no module: no optimizer, saved state, train() or gradient exchange meets it.
    """

    label_weight: float = 1.0
    smoothing: float = 0.0  # of the labels
    teacher: nn.Module | None = None
    distill_weight: float = 0.0
    temperature: float = 1.0
    feature_weight: float = 0.0

    @property
    def reads_logits(self) -> bool:
        """Whether the loss depends on the logits, and so on all that they depend on."""
        return self.label_weight > 0 or (self.teacher is not None and self.distill_weight > 0)

    def __call__(self, student: nn.Module, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, C, H, W), targets (N,) or (N, K) -> the loss, a scalar, and the student's logits (N, K), detached."""
        with stage_outputs(student, self.feature_weight > 0) as features:
            logits: Tensor = student(images)
        loss = logits.new_zeros(())
        if self.label_weight:
            loss = self.label_weight * F.cross_entropy(logits, targets, label_smoothing=self.smoothing)
        if self.teacher is not None:
            with torch.no_grad(), stage_outputs(self.teacher, self.feature_weight > 0) as shown:
                answers = self.teacher(images)
            if self.distill_weight:
                loss = loss + self.distill_weight * distillation_loss(logits, answers, self.temperature)
            if self.feature_weight:
                loss = loss + self.feature_weight * attention_distance(features, shown)
        return loss, logits.detach()


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 / N * sum_i KL(softmax(t_i / T) || softmax(s_i / T)) of logits (N, K), computed in float32 or wider.

    Its gradient in s is T / N * (softmax(s / T) - softmax(t / T)).
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    log_student, log_teacher = (F.log_softmax(logits.to(dtype) / temperature, dim=1) for logits in (student, teacher))
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def attention_distance(student: Maps, teacher: Maps) -> Tensor:
    """Sum over the stages that both have, mean over images, of |q_s / |q_s| - q_t / |q_t||_2 with q = sum_c x_c^2, flattened.

    Zagoruyko and Komodakis, arXiv 1612.03928, eq. 2; Martinez et al., arXiv 2003.11535, train binary networks with it. Raises
    InputError where no stage of the two has outputs of equal height and width.
    """
    pairs = [
        (student[r], teacher[r])
        for r in student.keys() & teacher.keys()
        if student[r].shape[2:] == teacher[r].shape[2:]
    ]
    if not pairs:
        raise InputError("feature_weight: model and teacher have no stage of equal size to compare; leave it at 0")
    return torch.stack([(_attention(s) - _attention(t)).norm(dim=1).mean() for s, t in pairs]).sum()


def _attention(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, H * W), of length 1; in float32 or wider."""
    squares = x.to(torch.promote_types(x.dtype, torch.float32)).square().sum(dim=1)
    return F.normalize(squares.flatten(1), dim=1)


@contextmanager
def stage_outputs(model: nn.Module, wanted: bool = True) -> Iterator[Maps]:
    """What the stages of `model` give in a forward: the last of each reduction that timm's `feature_info` names.

    Outputs that are no (N, C, H, W) with the channels it states are left out, and modules that the network has not (HRNet's).
    """
    outputs: Maps = {}
    info: Any = getattr(model, "feature_info", None) if wanted else None
    modules = dict(model.named_modules()) if wanted else {}
    handles = [
        modules[stage["module"]].register_forward_hook(_keeper(outputs, stage["reduction"], stage["num_chs"]))
        for stage in (getattr(info, "info", info) or ())
        if stage["module"] in modules
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _keeper(outputs: Maps, reduction: int, channels: int) -> Any:
    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and output.shape[1] == channels:
            outputs[reduction] = output

    return keep
