"""Mathematical notation, LaTeX or plain, as tokens."""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_LENGTH = 2_000
"""Characters of an answer that is read as mathematics; longer ones are compared as text."""
MAX_TOKENS = 1_000


class Unreadable(ValueError):
    """The text is not an expression of the grammar, or too large a one."""


@dataclass(frozen=True, slots=True)
class Token:
    """`kind` is number, base, symbol, constant, function, word, operator or command; `text` its canonical spelling."""

    kind: str
    text: str
    spaced: bool = False
    """Whether a space stood before it."""


GREEK = frozenset(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau upsilon phi varphi chi psi omega "
    "Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega ell hbar".split()
)
FUNCTIONS = frozenset(
    "sin cos tan cot sec csc arcsin arccos arctan arccot arcsec arccsc sinh cosh tanh coth log ln lg exp sqrt cbrt max min gcd lcm det abs floor ceil "
    "Re Im arg deg dim ker sgn".split()
)
ALIASES = {"asin": "arcsin", "acos": "arccos", "atan": "arctan", "operatorname": "", "floor": "floor"}
CONSTANTS = {"pi": "pi", "infty": "inf", "infinity": "inf", "inf": "inf", "oo": "inf", "e": "e", "i": "i"}
RELATIONS = {
    "=": "=", "≈": "≈", "<": "<", ">": ">", "<=": "<=", ">=": ">=", "!=": "!=", "\\le": "<=", "\\leq": "<=", "\\leqslant": "<=", "\\ge": ">=",
    "\\geq": ">=", "\\geqslant": ">=", "\\lt": "<", "\\gt": ">", "\\ne": "!=", "\\neq": "!=", "\\approx": "≈", "\\in": "in", "\\equiv": "==",
    "\\sim": "~", "\\to": "to", "\\rightarrow": "to", "\\mapsto": "to", "\\subset": "sub", "\\subseteq": "sub", "\\mid": "|", "\\implies": "=>",
    "\\perp": "perp", "\\parallel": "par", "\\cong": "cong", "\\colon": ":", "\\iff": "<=>",
}  # fmt: skip
OPERATORS = {
    "\\cdot": "*", "\\times": "*", "\\ast": "*", "\\div": "/", "\\pm": "±", "\\mp": "∓", "\\cup": "∪", "\\cap": "∩", "\\setminus": "∖",
    "\\backslash": "∖", "\\bmod": "mod", "\\mod": "mod", "\\pmod": "pmod", "\\circ": "°", "\\degree": "°", "\\%": "%", "\\{": "\\{", "\\}": "\\}",
    "\\lbrace": "\\{", "\\rbrace": "\\}", "\\lbrack": "[", "\\rbrack": "]", "\\vert": "|", "\\lvert": "|", "\\rvert": "|", "\\|": "|",
    "\\lfloor": "⌊", "\\rfloor": "⌋", "\\lceil": "⌈", "\\rceil": "⌉", "\\langle": "⟨", "\\rangle": "⟩", "\\\\": "\\\\", "\\prime": "'",
    "\\$": "$", "\\#": "#", "\\&": "&", "\\_": "_", "\\lor": "or", "\\vee": "or", "\\land": "and", "\\wedge": "and", "**": "^",
}  # fmt: skip
_SPACES = frozenset(("\\,", "\\!", "\\;", "\\:", "\\ ", "\\>", "\\quad", "\\qquad", "\\left", "\\right", "\\big", "\\Big", "\\bigl", "\\bigr", "\\Bigl",
    "\\Bigr", "\\bigg", "\\Bigg", "\\biggl", "\\biggr", "\\displaystyle", "\\textstyle", "\\limits", "\\nolimits", "\\hspace", "\\phantom", "\\hfill",
    "\\allowbreak", "\\null", "\\strut", "\\middle", "\\enspace", "\\thinspace", "\\nonumber", "\\rm", "\\bf", "\\it", "\\mathopen", "\\mathclose"))  # fmt: skip
_STYLES = "text|textbf|textit|textrm|textnormal|texttt|textsf|mathrm|mathbf|mathit|mathsf|mathcal|mathfrak|boldsymbol|bm|mbox|hbox|operatorname\\*?|emph|underline|ensuremath"
_STYLE = re.compile(rf"\\(?:{_STYLES})\s*\{{((?:[^{{}}]|\{{[^{{}}]*\}})*)\}}")
_BARE_STYLE = re.compile(rf"\\(?:{_STYLES})(?![a-zA-Z])")
_ESCAPES = (("\x0crac", "\\frac"), ("\x0c", "\\f"), ("\x08oxed", "\\boxed"), ("\x08egin", "\\begin"), ("\x08inom", "\\binom"), ("\times", "\\times"),
    ("\text{", "\\text{"), ("\tfrac", "\\tfrac"), ("\theta", "\\theta"), ("\tan", "\\tan"), ("\right", "\\right"), ("\rangle", "\\rangle"))  # fmt: skip
_UNICODE = str.maketrans({
    "−": "-", "–": "-", "—": "-", "‐": "-", "×": "*", "·": "*", "⋅": "*", "∙": "*", "÷": "/", "∕": "/", "⁄": "/", "π": " pi ", "∞": " inf ", "√": "\\sqrt ", "∛": "\\cbrt ",
    "≤": "<=", "≥": ">=", "≦": "<=", "≧": ">=", "⩽": "<=", "⩾": ">=", "≠": "!=", "≈": "\\approx ", "∈": "\\in ", "∪": "\\cup ", "∩": "\\cap ", "∖": "\\setminus ",
    "±": "\\pm ", "∓": "\\mp ", "°": "\\circ ", "º": "\\circ ", "′": "'", "’": "'", "“": '"', "”": '"', "…": "...", "∅": "\\emptyset ", "ℝ": "R", "ℤ": "Z", "ℕ": "N",
    "θ": "\\theta ", "α": "\\alpha ", "β": "\\beta ", "γ": "\\gamma ", "λ": "\\lambda ", "μ": "\\mu ", "ω": "\\omega ", "φ": "\\phi ", "σ": "\\sigma ", "Δ": "\\Delta ",
    "½": "\\frac{1}{2}", "⅓": "\\frac{1}{3}", "⅔": "\\frac{2}{3}", "¼": "\\frac{1}{4}", "¾": "\\frac{3}{4}", "⅕": "\\frac{1}{5}", "⅛": "\\frac{1}{8}",
    "{": "{", "（": "(", "）": ")", "，": ",", "：": ":", "；": ";", "＝": "=", "＋": "+", "％": "%", "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u200b": "", "\ufeff": "",
    "€": "\\$", "£": "\\$", "¥": "\\$", "\t": " ",
})  # fmt: skip
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_SUBSCRIPT = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_TOKEN = re.compile(
    r"(?P<base>(?<!\^)\d[0-9A-Z]*_(?:\{\d{1,2}\}|\d{1,2}))(?![\d.])"
    r"|(?P<repeated>\d*\.\\overline\{\d+\})"
    r"|(?P<number>(?:\d{1,3}(?:,\d{3})+(?![\d])|\d+)(?:\.\d+|\.(?=\s*[-+*/^]))?(?:[eE][+-]?\d{1,6}(?![\w]))?|\.\d+)(?P<repeat>\\overline\{\d+\})?"
    r"|(?P<command>\\[a-zA-Z]+|\\.)"
    r"|(?P<word>[A-Za-z]+)"
    r"|(?P<operator>\*\*|<=|>=|!=|==|\.\.\.|[-+*/^_!=<>()\[\]{}|,;:&%'$\"?.~#@])",
    re.DOTALL,
)


_DOLLAR = re.compile(r"(?<!\\)\$")
_BUILDER = re.compile(
    r"\\\{\s*\(?[a-zA-Z]\)?\s*(?:\\in\s*(?:\\mathbb\s*\{?)?[A-Z]\}?\s*)?(?:\\[,;: ]\s*)*(?:\\mid|\\middle\s*\||\\vert|\||:)(?:\\[,;: ])*\s*"
    r"((?:[^{}|:]|\{[^{}]*\}){1,200}?)\\\}"
)
_BRACKETED_WORDS = re.compile(r"\\text\w*\{\s*\(([^(){}]*)\)\s*\}")
_ROW_GAP = re.compile(r"\\\\\s*\[\s*-?\d+(?:\.\d+)?\s*(?:pt|em|ex|mm|cm)\s*\]")
_COLOUR = re.compile(r"\\(?:text)?color\s*\{\s*\w+\s*\}")
_INFIX = re.compile(r"\{([^{}]*)\\(choose|over)(?![a-z])([^{}]*)\}")
"""`\\{x | condition\\}` is its condition."""


def clean(text: str) -> str:
    """Text with one spelling for each sign: ASCII where there is one, no styling commands, no dollar delimiters."""
    if len(_DOLLAR.findall(text)) % 2 == 0:  # delimiters; an odd one is money
        text = _DOLLAR.sub(" ", text)
    for broken, repaired in _ESCAPES:
        text = text.replace(broken, repaired)
    text = _BRACKETED_WORDS.sub(r"\\text{\1}", text)
    text = _ROW_GAP.sub(r"\\\\ ", text)
    text = _COLOUR.sub("", text)
    text = _INFIX.sub(
        lambda m: f"\\{'binom' if m.group(2) == 'choose' else 'frac'}{{{m.group(1)}}}{{{m.group(3)}}}", text
    )
    text = text.strip().strip("*").rstrip("\\") if not text.endswith("\\}") else text.strip().strip("*")
    text = _SUPERSCRIPT.sub(lambda m: "^{" + m.group().translate(_SUPERSCRIPTS) + "}", text)
    text = _SUBSCRIPT.sub(lambda m: "_{" + m.group().translate(_SUBSCRIPTS) + "}", text).translate(_UNICODE)
    text = (
        re.sub(r"(?<!\\)\\\\(?=(?:[a-zA-Z]{2,}|[{}()\[\],!$%]))", r"\\", text)
        if "\\begin" not in text
        else re.sub(r"(?<!\\)\\\\(?=(?:d?frac|sqrt|text|pi|left|right|begin|end)\b)", r"\\", text)
    )
    text = re.sub(r"(?<=\d)\s*(?:\{,\}|\\!|\\,|,\\!|\{,\}\\!|,\\,|~)+\s*(?=\d{3}(?!\d))", lambda m: ",", text)
    text = re.sub(
        r"(?<![\d.,])(\d{1,3})((?: \d{3})+)(?![\d])", lambda m: m.group(1) + m.group(2).replace(" ", ","), text
    )
    text = (
        re.sub(r"(?<=\d),\s(?=000\b)", ",", text)
        if re.fullmatch(r"[\s$\\]*\d{1,3}(?:, ?\d{3})+[\s$.]*", text) and ", 000" in text
        else text
    )
    text = re.sub(r"(?<=\d)\^?\s*\{?\s*(?:\\(?:text|mathrm|mbox)\s*\{)?\s*(?:st|nd|rd|th)\b\s*\}{0,2}", "", text)
    text = re.sub(r"\^\s*\{?\s*\\prime\s*\}?", "'", text)
    return _BUILDER.sub(r" \1 ", text)


def unstyle(text: str) -> str:
    """Styling commands replaced by their content, innermost first; words among it keep a mark of their own (`"`)."""
    for _ in range(4):
        replaced = _STYLE.sub(lambda m: f' "{m.group(1)}" ' if m.group(1).strip(" ()[].,") else m.group(1), text)
        if replaced == text:
            break
        text = replaced
    return _BARE_STYLE.sub(" ", text)


def tokenize(text: str) -> list[Token]:
    """Tokens of a cleaned text.

    Raises:
        Unreadable: for a character outside the notation, or too many tokens.
    """
    if len(text) > MAX_LENGTH:
        raise Unreadable("too long")
    text = unstyle(text)
    tokens: list[Token] = []
    position, spaced, quoted = 0, False, False
    while position < len(text):
        if text[position].isspace():
            position, spaced = position + 1, True
            continue
        match = _TOKEN.match(text, position)
        if match is None:
            raise Unreadable(f"character {text[position]!r}")
        if len(tokens) > MAX_TOKENS:
            raise Unreadable("too many tokens")
        position = match.end()
        kind, piece = match.lastgroup, match.group()
        if kind == "repeat" or kind == "number":
            tokens.append(Token("number", piece.replace(",", ""), spaced))
        elif kind in ("base", "repeated"):
            tokens.append(Token("base" if kind == "base" else "number", piece, spaced))
        elif kind == "word":
            tokens += _words(
                piece, spaced, quoted, follows=bool(tokens) and (tokens[-1].kind == "number" or tokens[-1].text in "})")
            )
        elif kind == "command":
            tokens += _command(piece, spaced)
        elif piece == '"':
            quoted = not quoted
            spaced = True
            continue
        elif piece == "$":
            if re.match(r"\s*(?:\d|\.\d)", text[position : position + 10]):
                tokens.append(Token("operator", "$", spaced))
        elif piece in RELATIONS:
            tokens.append(Token("relation", RELATIONS[piece], spaced))
        elif piece == "~":
            spaced = True
            continue
        else:
            tokens.append(Token("operator", OPERATORS.get(piece, piece), spaced))
        spaced = False
    return tokens


def _words(letters: str, spaced: bool, quoted: bool, *, follows: bool = False) -> list[Token]:
    """A run of letters: a known name, the product of single letters, or a word."""
    lower = letters.lower()
    if lower in ("and", "or"):
        return [Token("operator", lower, spaced)]
    if letters in ALIASES:
        return [Token("function", ALIASES[letters], spaced)]
    if letters in FUNCTIONS and not (quoted and letters == "min"):
        return [Token("function", letters, spaced)]
    if lower in ("pi", "infinity", "infty", "inf", "oo"):
        return [Token("constant", CONSTANTS[lower], spaced)]
    if letters in GREEK:
        return [Token("symbol", letters, spaced)]
    if len(letters) == 1:
        if letters in ("e", "i"):
            return [Token("constant", letters, spaced)]
        if quoted and (letters in "mgshl" or (letters.isupper() and follows)):
            return [Token("word", letters, spaced)]
        return [Token("symbol", letters, spaced)]
    if letters.isupper() and not quoted:  # a segment, an angle, a name of economics: one thing, in this order
        return [Token("symbol", letters, spaced)]
    if (quoted and len(letters) > 2) or len(letters) > 3 or (lower in _SHORT_WORDS and not letters.isupper()):
        for name in ("sqrt", "sin", "cos", "tan", "log", "ln", "pi"):  # sinx, pir
            rest = letters[len(name) :]
            if not quoted and letters.startswith(name) and 0 < len(rest) <= 2:
                head = Token("constant", "pi", spaced) if name == "pi" else Token("function", name, spaced)
                return [head, *_words(rest, False, quoted)]
        return [Token("word", lower, spaced)]
    return [Token("constant" if c in "ei" else "symbol", c, spaced and n == 0) for n, c in enumerate(letters)]


_SHORT_WORDS = frozenset(
    "cm mm km ft in mi yd lb lbs oz kg mg hr hrs min sec mph kmh am pm no yes odd the is are to of per day all one two six ten red not for has day mod dne sq cu ml gal "
    "men cup box bus her his she him may its via ton let set".split()
)


def _command(name: str, spaced: bool) -> list[Token]:
    if name in _SPACES or re.fullmatch(r"\\[()\[\]]", name):
        return []
    if name in RELATIONS:
        return [Token("relation", RELATIONS[name], spaced)]
    if name in OPERATORS:
        return [Token("operator", OPERATORS[name], spaced)]
    letters = name[1:]
    if letters in ("frac", "dfrac", "tfrac", "cfrac", "nicefrac", "sfrac"):
        return [Token("command", "frac", spaced)]
    if letters in ("binom", "dbinom", "tbinom", "choose"):
        return [Token("command", "binom", spaced)]
    if letters == "pi":
        return [Token("constant", "pi", spaced)]
    if letters in ("infty", "infinity"):
        return [Token("constant", "inf", spaced)]
    if letters in ("sqrt", "cbrt"):
        return [Token("command", letters, spaced)]
    if letters in FUNCTIONS:
        return [Token("function", letters, spaced)]
    if letters in GREEK:
        return [Token("symbol", letters, spaced)]
    if letters in ("ldots", "dots", "cdots", "dotsc", "dotsb", "vdots"):
        return [Token("operator", "...", spaced)]
    if letters in ("emptyset", "varnothing"):
        return [Token("constant", "emptyset", spaced)]
    if letters in ("mathbb", "Bbb"):
        return []
    if letters == "angle" or letters == "triangle" or letters == "therefore":
        return []
    if letters in (
        "begin",
        "end",
        "sum",
        "prod",
        "int",
        "lim",
        "overline",
        "bar",
        "vec",
        "hat",
        "widehat",
        "tilde",
        "overrightarrow",
        "dot",
        "ddot",
        "boxed",
        "fbox",
    ):
        return [Token("command", letters, spaced)]
    if letters.startswith("quad") and len(letters) > 4:  # \quadx
        return _words(letters[4:], True, False)
    for known in ("arcsin", "arccos", "arctan", "sin", "cos", "tan", "cot", "sec", "csc", "log", "ln"):  # \\cotx
        if letters.startswith(known) and 0 < len(letters) - len(known) <= 2:
            return [Token("function", known, spaced), *_words(letters[len(known) :], False, False)]
    if letters.isalpha():
        return [Token("word", letters.lower(), spaced)]
    raise Unreadable(f"command {name}")
