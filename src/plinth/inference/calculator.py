"""Arithmetic from text, exact where it can be, at a bounded cost: nothing of Python is run.

Numbers are fractions, so 0.1 + 0.2 is 0.3; what is irrational, and a decimal of more than 15 digits, is a double.
"""

from __future__ import annotations

import ast
import decimal
import math
import operator
from collections.abc import Callable
from fractions import Fraction

from plinth.config import UserError, nearest

MAX_CHARACTERS = 200
MAX_DEPTH = 100  # a sum of n numbers has depth n
MAX_BITS = 1024  # of a numerator or a denominator
DIGITS = 15  # significant ones of what is no whole number
SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "^": "**"})
CONSTANTS = {"pi": Fraction(math.pi), "e": Fraction(math.e)}


def calculate(expression: str) -> str:
    """Return the value of an arithmetic expression: + - * / // % ** (or ^), brackets, pi, e and the functions of FUNCTIONS.

    Raises UserError for anything else, for what has no real value, and for what is too long, too deep or too large.
    """
    if len(expression) > MAX_CHARACTERS:
        raise UserError(f"the expression has {len(expression)} characters; at most {MAX_CHARACTERS} are taken.")
    try:
        tree = ast.parse(expression.translate(SIGNS).strip(), mode="eval")
        return _written(_value(tree.body, 0))
    except UserError:
        raise
    except ZeroDivisionError:
        raise UserError(f"{expression!r} divides by zero.") from None
    except OverflowError:
        raise UserError(f"{expression!r} is too large.") from None
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        raise UserError(f"{expression!r} is no arithmetic expression with a real value.") from None


def _value(node: ast.expr, depth: int) -> Fraction:
    if depth > MAX_DEPTH:
        raise UserError(f"the expression is nested deeper than {MAX_DEPTH}.")
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _bounded(Fraction(repr(node.value)))  # of a decimal as it is written, not of the double beside it
    if isinstance(node, ast.Name) and node.id in CONSTANTS:
        return CONSTANTS[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
        value = _value(node.operand, depth + 1)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return _bounded(OPERATORS[type(node.op)](_value(node.left, depth + 1), _value(node.right, depth + 1)))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        return _called(node.func.id, [_value(argument, depth + 1) for argument in node.args])
    raise UserError(f"the expression holds {type(node).__name__}, which is no arithmetic.")


def _called(name: str, arguments: list[Fraction]) -> Fraction:
    if name not in FUNCTIONS:
        raise UserError(f"{name} is no function of the calculator ({', '.join(FUNCTIONS)}).{nearest(name, FUNCTIONS)}")
    return _bounded(Fraction(FUNCTIONS[name](*arguments)))


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        return Fraction(math.pow(base, exponent))
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if base not in (0, 1, -1) and (bits - 1) * abs(exponent.numerator) > MAX_BITS:  # before the work, not behind it
        raise OverflowError
    if abs(base) == 1:
        return base ** (exponent.numerator % 2)
    return base**exponent.numerator if base else Fraction(0) ** min(exponent.numerator, 1)


def _root(value: Fraction) -> Fraction | float:
    if value < 0:
        raise ValueError
    root = Fraction(math.isqrt(value.numerator), math.isqrt(value.denominator))
    return root if root * root == value else math.sqrt(value)


def _rounded(value: Fraction, digits: Fraction = Fraction(0)) -> Fraction:
    if digits.denominator != 1 or abs(digits) > DIGITS:
        raise UserError(f"round(x, digits) takes whole digits from -{DIGITS} to {DIGITS}.")
    return Fraction(round(value, int(digits)))


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise OverflowError
    return value


def _written(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    with decimal.localcontext(prec=DIGITS):
        number = (decimal.Decimal(value.numerator) / decimal.Decimal(value.denominator)).normalize()
    return f"{number:f}" if -DIGITS <= number.adjusted() < DIGITS else f"{number:e}"


OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda a, b: Fraction(a // b),
    ast.Mod: operator.mod,
    ast.Pow: _power,
}
FUNCTIONS: dict[str, Callable[..., Fraction | float | int]] = {
    "sqrt": _root,
    "abs": abs,
    "round": _rounded,
    "floor": math.floor,
    "ceil": math.ceil,
    "min": min,
    "max": max,
    "exp": math.exp,
    "log": math.log,
    "sin": math.sin,
    "cos": math.cos,
    "tan": math.tan,
}
