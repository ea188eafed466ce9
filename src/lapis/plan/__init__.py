"""Which layers to tune, freeze or merge, with evidence: `lapis.plan(base, chat, goal="style", budget=0.25, ...)`."""

from typing import TYPE_CHECKING

from lapis.rooms import furnish

if TYPE_CHECKING:
    from lapis.plan.make import plan
    from lapis.plan.result import PlanResult

__all__ = ["PlanResult", "plan"]

furnish(__name__, {"PlanResult": "result", "plan": "make"}, verb="plan")
