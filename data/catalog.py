"""Sources by name. A new one is a file with a `prepare` function and a line here."""

from data import gsm8k, stories

SOURCES = {"stories": stories.prepare, "gsm8k": gsm8k.prepare}
