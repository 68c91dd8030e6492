"""`siman doctor`: what siman stands on here, what is wrong, and what to do about it."""

import textwrap

from siman_convert.cli.common import QUIET, RUNS, Json, Output, print_json


def doctor(output: Output = RUNS, as_json: Json = False) -> int:
    """Check this installation and machine.

    Exit code 0: siman can be used here. Prints a block for bug reports, without names of users or machines.
    """
    from dataclasses import asdict

    from siman_convert.doctor import bug_report, examine

    report = examine(output)
    if as_json:
        problems = [asdict(problem) for problem in report.problems]
        print_json({"usable": report.usable, "facts": report.facts, "problems": problems})
        return 0 if report.usable else 1
    if not QUIET.get():
        print("For a bug report, copy the lines between the marks:\n\n```text")
        print("\n".join(bug_report(report)))
        print("```\n")
    for problem in report.problems:
        print(f"{'PROBLEM' if problem.serious else 'note':<8} {problem.what}")
        for line in textwrap.wrap(problem.mend, 110):
            print(f"{'':8} {line}")
    print("siman can be used here." if report.usable else "siman cannot be used here.")
    return 0 if report.usable else 1
