"""What the policy said early and late, side by side, tinted by the policy version that sampled it."""

from __future__ import annotations

from html import escape
from typing import Any

from april.observe.report_data import Record, RunData, finite
from april.observe.report_page import note, section
from april.observe.words import number

MAX_PROMPTS = 4
MAX_RESPONSES = 4
MAX_CHARACTERS = 6000
TINTS = 5

Pair = tuple[Record, Record]


def transcripts_section(run: RunData) -> str:
    """The section of the page."""
    pairs = choose_pairs([r for r in run.transcripts if isinstance(r.get("responses"), list) and r["responses"]])
    return section(
        "What the policy says, early and late",
        "Left: an early answer; right: a late one. A green edge marks a correct answer, a red one a wrong one. Where the tint "
        "changes, the answer was parked and continued by newer weights; the small v-number is the policy version that wrote "
        "the part.",
        *(_pair(early, late) for early, late in pairs),
        missing="transcripts.jsonl has no recorded groups",
    )


def choose_pairs(transcripts: list[Record]) -> list[Pair]:
    """Early and late record of the same prompt, the widest apart first; of different prompts when none came twice."""
    seen: dict[str, list[Record]] = {}
    for record in transcripts:
        seen.setdefault(str(record.get("prompt_id")), []).append(record)
    pairs = [(records[0], records[-1]) for records in seen.values() if records[-1]["step"] > records[0]["step"]]
    if pairs:
        return sorted(pairs, key=lambda pair: pair[0]["step"] - pair[1]["step"])[:MAX_PROMPTS]
    if not transcripts:
        return []
    first = [r for r in transcripts if r["step"] == transcripts[0]["step"]]
    last = [r for r in transcripts if r["step"] == transcripts[-1]["step"]]
    return list(zip(first, last, strict=False))[: MAX_PROMPTS // 2]


def _pair(early: Record, late: Record) -> str:
    same = early.get("prompt_id") == late.get("prompt_id")
    columns = []
    for record in (early, late) if early is not late else (early,):
        answers = "".join(_answer(response) for response in record["responses"][:MAX_RESPONSES] if isinstance(response, dict))
        hidden = len(record["responses"]) - MAX_RESPONSES
        more = note(f"{hidden} more answers of this group are in transcripts.jsonl") if hidden > 0 else ""
        prompt = "" if same else _prompt(record)
        columns.append(f"<div><h3>Step {escape(number(record['step']))}{_source(record)}</h3>{prompt}{answers}{more}</div>")
    return f"{_prompt(early) if same else ''}<div class='pair'>{''.join(columns)}</div>"


def _source(record: Record) -> str:
    return " (evaluation)" if record.get("source") == "evaluation" else ""


def _prompt(record: Record) -> str:
    label = f"Prompt {record.get('prompt_id', '')}"
    return (
        f'<div class="prompt"><span class="small">{escape(label)}</span><pre>{escape(str(record.get("prompt", "")))}</pre></div>'
    )


def _answer(response: Record) -> str:
    kind = "right" if response.get("correct") else "wrong"
    facts = ["correct" if response.get("correct") else "not correct"]
    if finite(response.get("reward")):
        facts.append(f"reward {number(response['reward'])}")
    if response.get("failure"):
        facts.append(f"failed: {response['failure']}")
    if finite(response.get("tokens")):
        facts.append(f"{number(response['tokens'])} tokens")
    if response.get("stop"):
        facts.append(f"ended by {response['stop']}")
    segments = _segments(response)
    if len(segments) > 1:
        facts.append("versions " + ", ".join(f"v{version} ({end - start} tokens)" for start, end, version in segments))
    return (
        f'<div class="answer {kind}"><header>{escape(" · ".join(facts))}</header><pre>{_tinted(response, segments)}</pre></div>'
    )


def _tinted(response: Record, segments: list[tuple[int, int, int]]) -> str:
    """The text, each segment in its own tint when it is known where in the text it ends."""
    text = str(response.get("text", ""))
    ends = response.get("text_ends")
    known = isinstance(ends, list) and len(ends) == len(segments) > 1 and all(finite(end) for end in ends)
    if not known:
        return escape(text[:MAX_CHARACTERS]) + _cut(text)
    parts, start = [], 0
    versions = sorted({version for *_, version in segments})
    for end, (_, _, version) in zip([int(end) for end in ends or ()], segments, strict=True):
        tint = versions.index(version) % TINTS
        piece = escape(text[start : min(end, MAX_CHARACTERS)])
        parts.append(f'<span class="seg v{tint}" title="policy version {version}"><sup>v{version}</sup>{piece}</span>')
        start = max(start, end)
    return "".join(parts) + _cut(text)


def _cut(text: str) -> str:
    return f" … ({len(text) - MAX_CHARACTERS} more characters)" if len(text) > MAX_CHARACTERS else ""


def _segments(response: Record) -> list[tuple[int, int, int]]:
    """(start, end, version) of each well-formed segment."""
    raw: Any = response.get("segments")
    if not isinstance(raw, list):
        return []
    rows = [row for row in raw if isinstance(row, list) and len(row) == 3 and all(finite(cell) for cell in row)]
    return [(int(start), int(end), int(version)) for start, end, version in rows]
