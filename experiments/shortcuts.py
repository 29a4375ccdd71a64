"""
What do rules know that never look at who is asked? For a file in Coconut's format, ProsQA's
questions: "... Is Tom a lompus or a rempus?"

    python -m experiments.shortcuts prosqa_test.json

The rule of k edges looks k edges back from each of the two options, for the nearest person there,
and takes the option whose person is further away, or not in sight; where both are equally far it
has half a point. A model that scores no more than such a rule may have learnt no more than it.
"""
import json
import re
import sys
from pathlib import Path

from sample import wilson

QUESTION = re.compile(r'Is (\w+) (?:an? )?(\w+) or (?:an? )?(\w+)\?')
FACT = re.compile(r'(Every )?(\w+) is an? (\w+)\.')


def distance_to_a_person(option, parents, people, k):
    """Edges from an option back to the nearest person, at most k; k + 1 where none is in sight."""
    names = {option}
    for distance in range(1, k + 1):
        names = {parent for name in names for parent in parents.get(name, ())}
        if names & people:
            return distance
    return k + 1


def score(row, k):
    """1, 0.5 or 0 for the rule of k edges on one row; None where it is no such question."""
    asked = QUESTION.search(row['question'])
    if not asked:
        return None
    facts, parents, people = row['question'][:asked.start()], {}, set()
    for every, name, kind in FACT.findall(facts):
        parents.setdefault(kind, set()).add(name)
        if not every:
            people.add(name)
    one, other = (distance_to_a_person(option, parents, people, k) for option in asked.groups()[1:])
    if one == other:
        return 0.5
    chosen = asked[2] if one > other else asked[3]
    return float(chosen == re.findall(r'\w+', row['answer'])[-1])


if __name__ == '__main__':
    path = Path(sys.argv[1])
    content = path.read_text('utf-8')
    lines = content.splitlines() if path.suffix == '.jsonl' else []
    rows = [json.loads(line) for line in lines] or json.loads(content)
    for k in (1, 2, 3):
        scores = [points for points in (score(row, k) for row in rows) if points is not None]
        assert scores, f'{path} holds no question like "Is Tom a lompus or a rempus?"'
        p = sum(scores) / len(scores)
        low, high = wilson(p, len(scores))
        print(f'{k} edges back: {100 * p:.1f} % ({100 * low:.1f} to {100 * high:.1f}) of '
              f'{len(scores)} rows, {scores.count(0.5)} of them undecided')
