"""Chat templates that take time or memory without end, or try to reach what is not theirs: text, words of the error."""

SLOW = "computes for more than 1 s on"
LARGE = f"memory|MemoryError|{SLOW}"
"""A busy machine takes the second first, while it clears the memory that is asked for."""
FOREVER = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = "{% set n = namespace(x=START) %}{% for i in range(99) %}{% set n.x = STEP %}{% endfor %}{{ n.x }}"


def doubling(start: str, step: str) -> str:
    return DOUBLING.replace("START", start).replace("STEP", step)


TEMPLATES = {
    "divides by zero": ("{{ 1 // 0 }}", "ZeroDivisionError"),
    "loops in loops": (FOREVER, SLOW),
    "loops in a macro": (f"{{% macro f() %}}{FOREVER}{{% endmacro %}}{{{{ f() }}}}", SLOW),
    "macro calls itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "macro calls itself twice": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        SLOW,
    ),
    "text times 10**11": ("{{ 'a' * 10**11 }}", LARGE),
    "list times 10**9": ("{{ ([0] * 10**9) | length }}", LARGE),
    "power of powers": ("{{ (7 ** (9 ** 10)) % 7 }}", LARGE),
    "centred in 10**10": ("{{ 'a' | center(10**10) }}", LARGE),
    "formatted to 10**10": ("{{ '%10000000000d' | format(1) }}", LARGE),
    "method formats to 10**10": ("{{ '{:10000000000}'.format(1) }}", LARGE),
    "justified to 10**10": ("{{ 'a'.ljust(10**10) }}", LARGE),
    "text doubled": (doubling("'a'", "n.x + n.x"), LARGE),
    "text doubled by ~": (doubling("'a'", "n.x ~ n.x"), LARGE),
    "list of itself twice": (doubling("[1]", "[n.x, n.x]"), f"{LARGE}|RecursionError"),
    "every letter replaced": (doubling("'aa'", "n.x.replace('a', n.x)"), LARGE),
    "joined again and again": (doubling("'ab'", "n.x | join(n.x)"), LARGE),
    "lorem ipsum": ("{{ lipsum(n=10**7) }}", LARGE),
    "indented by 10**9": ("{{ 'a\\nb' | indent(10**9) }}", LARGE),
    "filled batch": ("{{ [1] | batch(10**9, 0) | list | length }}", LARGE),
    "slow search": ("{{ ('a' * 10**8).rfind('b' ~ 'a' * 5 * 10**7) }}{{ 'a' * 10**10 }}", LARGE),
    "a long text": (
        "{% for i in range(90000) %}{{ messages[0].content }} and so on and on{% endfor %}",
        "characters of",
    ),
    "brackets": ("{{ " + "(" * 30000 + "1" + ")" * 30000 + " }}", "RecursionError|no valid Jinja|ended by itself"),
    "a huge error": ("{{ raise_exception('x' * 10**7) }}", "TemplateError: xxx"),
    "attributes": ("{{ ''.__class__.__mro__ }}", "SecurityError|does not write|0 times"),
    "a file": ("{% include '/etc/passwd' %}", "no loader"),
    "no Jinja": ("{% for %}", "no valid Jinja"),
}
