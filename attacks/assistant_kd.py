"""Assistant chain as an attack: Mirzadeh et al., "Improved Knowledge Distillation via Teacher Assistant", AAAI 2020."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from kdbench.api import Access, Attack, Context, Oracle, Positive, QueryFunction, Share, inference

from .kd import distil


@dataclass(frozen=True)
class AssistantKD(Attack):
    """Distils the victim into an assistant, that one into the next, and the last one into the student; every hop is KD.

    The labels that are mixed in at each hop dilute what a defense has put into the answers. Only the first hop asks the
    oracle (queries: as in KD); an assistant's answers to augmented batches cost no queries.
    chain: registered networks from the victim's side to the student's, "" for the student's own; () is plain KD.
    Defaults: those of KD, so that only the hops differ from it.
    Departures: the default assistant has the student's size, where the paper's assistants stand between teacher and
    student. The KL is "batchmean" (the official code divides it by the number of classes). Temperature and alpha are not
    searched on test data.
    """

    needs: ClassVar[Access] = Access.TOPK

    chain: tuple[str, ...] = ("",)
    temperature: Positive = 4.0
    alpha: Share = 0.9
    queries: Literal["augmented", "once"] = "augmented"

    def steal(self, oracle: Oracle, ctx: Context) -> nn.Module:
        student = ctx.new_student()  # before the assistants: it starts from the same weights as the student of KD
        assistants = [ctx.new_student(name or None) for name in self.chain]
        teacher: QueryFunction = oracle
        queries: str = self.queries
        for pupil in (*assistants, student):
            distil(pupil, teacher, ctx, self.temperature, self.alpha, queries)
            teacher, queries = inference(pupil, ctx), "augmented"
        return student

    def networks(self) -> tuple[str, ...]:
        return tuple(name for name in self.chain if name)
