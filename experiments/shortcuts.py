"""
What do rules know that never look at who is asked? For a file in Coconut's format, ProsQA's
questions: "... Is Tom a lompus or a rempus?"

    python -m experiments.shortcuts prosqa_test.json
    python -m experiments.shortcuts data/prosqa/test.jsonl out-prosqa/answers_test.json

The rule of k edges looks k edges back from each of the two options, for the nearest person there,
and takes the option whose person is further away, or not in sight; where both are equally far it
has half a point. A model that scores no more than such a rule may have learnt no more than it: with
a run's answers to the same prepared rows, their accuracy is given apart by what the rule scores.
"""
import json
import re
import sys
from pathlib import Path

from prepare import digest
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
    path, *answers = [Path(name) for name in sys.argv[1:]]
    content, right = path.read_text('utf-8'), {}  # question_id -> whether a run answered it
    lines = content.splitlines() if path.suffix == '.jsonl' else []
    rows = [json.loads(line) for line in lines] or json.loads(content)
    for file in answers:
        answered = json.loads(file.read_text('utf-8'))
        assert answered['data'] == digest(path.parent, path.stem), f'{file} is of other rows'
        right = {found['question_id']: found['right'] for found in answered['answers']}
    for k in (1, 2, 3):
        scored = [(row, score(row, k)) for row in rows]
        scores = [points for _, points in scored if points is not None]
        assert scores, f'{path} holds no question like "Is Tom a lompus or a rempus?"'
        p = sum(scores) / len(scores)
        low, high = wilson(p, len(scores))
        print(f'{k} edges back: {100 * p:.1f} % ({100 * low:.1f} to {100 * high:.1f}) of '
              f'{len(scores)} rows, {scores.count(0.5)} of them undecided')
        for name, points in (('right', 1), ('undecided', 0.5), ('wrong', 0)):
            found = [right[row['question_id']] for row, one in scored
                     if one == points and row.get('question_id') in right]
            if found:
                print(f'    the answers where it is {name}: {100 * sum(found) / len(found):.1f} % '
                      f'of {len(found)}')
