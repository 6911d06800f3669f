"""What is to be known of a table before its figures are believed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edge_vlm.errors import ConfigError
from edge_vlm.evaluation.runs import CLIP, SCORED_POLICIES, THRESHOLD, Evaluator, Run

WITHOUT_SCORER = "take policy difference (by pixels), or --scorer change (of eval, or of export)"


def notes_on(evaluators: Mapping[str, Evaluator], runs: Sequence[Run]) -> list[str]:
    """Rows that a path leaves out, and rows that show the weights what they were not trained on.

    Raises ConfigError when nothing is left to measure.
    """
    notes, possible = [], False
    for path, evaluator in evaluators.items():
        rows = [run for run in runs if evaluator.can(run)]
        possible |= bool(rows)
        left_out = dict.fromkeys(run.policy for run in runs if not evaluator.can(run))
        scored = [policy for policy in left_out if policy in SCORED_POLICIES]
        if not evaluator.has_scores and scored:
            notes.append(
                f"{path}: no rows {', '.join(scored)}: the model has no scorer; {WITHOUT_SCORER}"
            )
        if THRESHOLD in left_out:
            notes.append(f"{path}: no rows {THRESHOLD}: that is for --scorer change alone")
        if path == "served" and any(run.policy == CLIP for run in rows):
            notes.append(
                "served: rows clip choose over the frames up to each question, as an asked file "
                "does; on other paths over the whole clip, whatever is asked when"
            )
        other = [run for run in rows if run.attention is not evaluator.attention]
        if other and len(other) < len(rows):
            notes.append(
                f"{path}: the weights were trained with attention {evaluator.attention.value}, "
                "rows with the other one show what they were not trained for"
            )
        elif other:
            usual = evaluator.attention.value
            notes.append(
                f"{path}: every row has attention {other[0].attention.value}, the weights were "
                f"trained with {usual}: --attention {usual}, or POLICY:KEEP:{usual}"
            )
    if not possible:
        raise ConfigError(
            "none of these rows can be measured",
            where="; ".join(notes) or None,
            remedy=WITHOUT_SCORER,
        )
    return notes
