"""What a task says of its own results: parts of the report, kept in result.json."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from wardround.results.schema import Part, Table
from wardround.tasks.task import Reporting, Task

log = logging.getLogger(__name__)


def parts_of(task: Task, tables: Mapping[str, Table]) -> tuple[Part, ...]:
    """The parts that a task makes of the numbers of all arms; none of a task that makes none.

    Where it fails, a part says so: a run of hours is not lost for a paragraph of its report.
    """
    if not isinstance(task, Reporting):
        return ()
    numbers = {
        arm: {
            site: {metric: found.value for metric, found in row.items() if found is not None}
            for site, row in table.items()
            if row is not None
        }
        for arm, table in tables.items()
    }
    try:
        made = task.report_parts(numbers)
        return tuple(Part(title=p.title, text=p.text, head=tuple(p.head), rows=tuple(map(tuple, p.rows))) for p in made)
    except Exception as error:
        log.debug("the task's part of the report could not be made", exc_info=True)
        text = f"The task's own part could not be made ({type(error).__name__}); all numbers are in result.json."
        return (Part(title="What the task says of its results", text=text),)
