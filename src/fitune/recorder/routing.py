"""Names how a mixture of experts may distribute the tokens in a recording."""

from typing import Literal

#: "balanced": every expert gets as many tokens as any other; "worst": all go to the same experts
Routing = Literal["balanced", "worst"]
