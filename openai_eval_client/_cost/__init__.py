"""What requests cost, can cost, and may cost."""

from openai_eval_client._cost.budget import (
    Budgets,
    CostBudget,
    Payment,
    Reservation,
    commit,
    reserve,
    reserve_now,
)
from openai_eval_client._cost.ledger import Ledger
from openai_eval_client._cost.pricing import Pricer, Rates, exact

Payments = Budgets  # as other rooms still call it

__all__ = [
    "Budgets",
    "CostBudget",
    "Ledger",
    "Payment",
    "Payments",
    "Pricer",
    "Rates",
    "Reservation",
    "commit",
    "exact",
    "reserve",
    "reserve_now",
]
