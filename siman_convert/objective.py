"""What training minimises: cross-entropy with the labels and, in binary epochs, the distance to a teacher's answers.

    L = distill_weight * T^2 * KL(softmax(t / T) || softmax(s / T)) + label_weight * CE(s, labels)

Student's and teacher's logits s and t (N, K) answer the same augmented (and mixed) images; means over the batch. The factor T^2
keeps the gradient's size as T grows (Hinton, Vinyals and Dean, arXiv 1503.02531). Matching of features inside is not offered.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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

    def __call__(self, images: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        """Images (N, C, H, W), the student's logits (N, K), targets (N,) or (N, K) -> a scalar."""
        loss = logits.new_zeros(())
        if self.label_weight:
            loss = self.label_weight * F.cross_entropy(logits, targets, label_smoothing=self.smoothing)
        if self.teacher is not None:
            with torch.no_grad():
                answers = self.teacher(images)
            loss = loss + self.distill_weight * distillation_loss(logits, answers, self.temperature)
        return loss


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 / N * sum_i KL(softmax(t_i / T) || softmax(s_i / T)) of logits (N, K), computed in float32 or wider.

    Its gradient in s is T / N * (softmax(s / T) - softmax(t / T)).
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    log_student, log_teacher = (F.log_softmax(logits.to(dtype) / temperature, dim=1) for logits in (student, teacher))
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
