"""Which words of an instruction name what is not wanted: labels for training.

A cue ("leave out", "not", "except") opens a scope that ends with its clause, as in NegEx (Chapman
et al., J. Biomed. Inform. 2001); a second cue in a scope closes it ("exclude everything but X").
"""

from __future__ import annotations

import re

_CUE = re.compile(
    r"\b(?:leav(?:e|ing) out|exclud(?:e|es|ed|ing)|omit(?:s|ted|ting)?|skip(?:s|ped|ping)?"
    r"|avoid(?:s|ing)?|ignor(?:e|es|ing)|hid(?:e|ing)|drop|remove|discard|filter out|without"
    r"|except(?: for)?|excepting|apart from|other than|anything but|everything but|nothing but"
    r"|none but|all but|but not|instead of|rather than|nothing|none|neither|not|never|no"
    r"|stay away from|steer clear of|free (?:of|from)|bar(?:ring)?|minus|cannot|can't|don't|doesn't"
    r"|do not|does not|isn't|aren't|won't|didn't|must not|mustn't|shouldn't|no use for"
    r"|not interested in|keep out|rule out|ruled out)\b",
    re.IGNORECASE,
)
_REST = frozenset({"nothing but", "none but"})  # Cues that cancel themselves.
# A cue that ends its clause speaks of what stands before it.
_FINAL_CUE = re.compile(
    r"(?:\b(?:is|are|must|may|should|need|can|to be|stays?|counts?)\b[^.;:!?]*?"
    r"\b(?:not (?:appear|be shown|be listed|what is meant|count|wanted|interest)|out of scope|out"
    r"|excluded|hidden|left out|handled elsewhere|off-topic|unwanted|useless)"
    r"|\bno(?:, thanks)?|\bnot)\s*$",
    re.IGNORECASE,
)
_CLAUSE_END = re.compile(
    r"[.;:!?]+(?:\s|$)|,\s+(?!(?:or|nor)\b)|(?<!\banything)(?<!\beverything)(?<!\bnothing)"
    r"(?<!\bnone)(?<!\ball)\s+but\s+(?!not\b)|\s+[\u2013\u2014-]\s+|\bshow\b|\bkeep\b"
    r"|\bonly\b(?! (?:if|when))",
    re.IGNORECASE,
)


def excluded_spans(instruction: str) -> list[tuple[int, int]]:
    """The spans of an instruction that name what is not wanted, as character positions."""
    spans: list[tuple[int, int]] = []
    start = 0
    ends = [match.span() for match in _CLAUSE_END.finditer(instruction)]
    for stop, after in [*ends, (len(instruction), len(instruction))]:
        clause = instruction[start:stop]
        cues = list(_CUE.finditer(clause))
        final = _FINAL_CUE.search(clause)
        if final and not (cues and cues[0].start() < final.start()):
            spans.append((start, start + final.start()))
        else:
            scopes = [*(cue.start() for cue in cues[1:]), len(clause)]
            for count, (cue, end) in enumerate(zip(cues, scopes, strict=False)):
                if (count + (cue.group().lower() in _REST)) % 2 == 0:
                    spans.append((start + cue.end(), start + end))
        start = after
    return [(a, b) for a, b in spans if instruction[a:b].strip()]
