"""The help of a command: plain text, its options under the headings that they name."""

from collections import defaultdict
from typing import Any

from typer.core import TyperCommand

OTHERS = "Options"


class Command(TyperCommand):
    """A command whose options may name a heading, as typer's `rich_help_panel`; without rich, typer itself has one list."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Arguments first, then the headings in the order of their first options, then the options without one."""
        sections: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                usual = "Arguments" if parameter.param_type_name == "argument" else OTHERS
                sections[getattr(parameter, "rich_help_panel", None) or usual].append(record)
        for heading, records in sorted(sections.items(), key=lambda section: section[0] == OTHERS):
            with formatter.section(heading):
                formatter.write_dl(records)
