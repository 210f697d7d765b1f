"""What requests cost, can cost, and may cost."""

from openai_eval_client._cost.budget import Budgets, CostBudget, Reservation, commit, reserve_now
from openai_eval_client._cost.ledger import Ledger, Pricer, Rates, exact

__all__ = [
    "Budgets",
    "CostBudget",
    "Ledger",
    "Pricer",
    "Rates",
    "Reservation",
    "commit",
    "exact",
    "reserve_now",
]
