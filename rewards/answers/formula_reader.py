"""The process that evaluates formulas: a line of LaTeX in, its value or null out (formula.py).

SymPy may take for ever or all memory over one expression, and no thread can be stopped. So it runs
here, where it can be killed. It ends with its parent, whose end of the pipe closes."""

from __future__ import annotations

import json
import logging
import math
import resource
import sys

MEMORY_BYTES = 4 << 30


def evaluated(latex: str) -> float | None:
    """The finite real number that ``latex`` states, as math-verify reads it; else None."""
    from math_verify import LatexExtractionConfig, parse

    found = parse(
        f"${latex}$", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None
    )
    if not found or not getattr(found[0], "is_number", False):
        return None
    expression = found[0]
    value = complex(expression.evalf(17))
    return value.real if value.imag == 0 and math.isfinite(value.real) else None


def main() -> None:
    logging.disable()  # math-verify reminds of timeouts, which formula.py has
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    evaluated("1+1")  # imports and builds the parser before the clock runs
    print("null", flush=True)
    for line in sys.stdin:
        try:
            value = evaluated(json.loads(line))
        except Exception:  # whatever SymPy trips over states no number
            value = None
        print(json.dumps(value), flush=True)


if __name__ == "__main__":
    main()
